"""Exchange between the replicas of tf.distribute, done entirely with sums over them.

A sum is the one collective that CPUs, GPUs and TPUs have in common. Values of other replicas are
removed by selection, never by a factor: 0 times -inf is not 0 (all_gather on a TPU multiplies).
"""

import zlib
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from negcache_core import OptionError, ShapeError
from negcache_core.adapter import Backend, Replicas, Route
from negcache_core.arrays._array import mask_rows

from ._backend import TENSORFLOW

# Dtypes that a sum supports everywhere; others are cast to one, or sent as bits.
_CAST = {
    **dict.fromkeys((tf.bool, tf.int8, tf.int16, tf.uint8, tf.uint16), tf.int32),
    **dict.fromkeys((tf.float16, tf.bfloat16), tf.float32),
}
_BITS = (tf.uint32, tf.int64, tf.uint64)


class StrategyReplicas(Replicas[Any]):
    """The replicas of a strategy: they run one program, on equal parts of the batch."""

    def __init__(self, strategy: tf.distribute.Strategy) -> None:
        self.strategy = strategy
        self.count = strategy.num_replicas_in_sync
        # Each worker traces its own program, so these may differ.
        self._many = isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)
        self._checks: list[Any] = []  # in the graph that is being traced

    @property
    def rank(self) -> Any:
        """The replica that is running: a number if it is known, as on CPUs and GPUs.

        0 outside `strategy.run`, where all replicas are one.
        """
        context = tf.distribute.get_replica_context()
        if context is None:
            return 0
        rank = context.replica_id_in_sync_group
        known = tf.get_static_value(rank)
        return tf.cast(rank, tf.int64) if known is None else int(known)

    def first(self, sizes: Sequence[int]) -> Any:
        return self.rank * sizes[0]

    def own(self, array: tf.Tensor, sizes: Sequence[int]) -> tf.Tensor:
        return TENSORFLOW.slice_rows(array, self.first(sizes), sizes[0])

    def numbers(self, own: Sequence[Any], like: tf.Tensor) -> list[tuple[int, ...]]:
        del like  # TensorFlow places tensors itself
        if None in own:
            raise ShapeError(
                "the batch has an unknown number of rows, but a sharded cache needs to know it: "
                "batch the dataset with drop_remainder=True."
            )
        self._check_equal(own, "replicas have unequal batches: batch with drop_remainder=True.")
        return [tuple(own)] * self.count

    def texts(self, own: str, like: tf.Tensor) -> list[str]:
        del like
        number = zlib.crc32(own.encode()) >> 1  # of 31 bits
        self._check_equal([number], f"the workers are set up differently; this one has {own}.")
        return [own] * self.count

    def noise(
        self, backend: Backend, generator: Any, rows: Sequence[int], draws: int, like: tf.Tensor
    ) -> tf.Tensor:
        # Replicas have different streams, so each makes its own queries' part.
        own = backend.uniform(generator, (rows[0], draws, 2), like)
        return self.gather([own], rows)[0]

    def gather(self, arrays: Sequence[tf.Tensor], sizes: Sequence[int]) -> list[tf.Tensor]:
        del sizes  # they have the sizes of `arrays`
        mine = tf.range(self.count, dtype=tf.int64) == self.rank
        return self._sum([_at_own_place(mine, array) for array in arrays])

    def gather_fresh(self, array: tf.Tensor, sizes: Sequence[int]) -> tf.Tensor:
        # The gradient of a sum over replicas is a sum, and that of a selection a selection.
        return self.gather([array], sizes)[0]

    def parts(self, array: tf.Tensor, sizes: Sequence[int]) -> tf.Tensor:
        (every,) = self.gather([array[None]], (1,) * self.count)
        rows = self.first(sizes) + tf.range(sizes[0], dtype=tf.int64)
        return tf.gather(every, rows, axis=1)

    def sum_of_parts(self, array: tf.Tensor, sizes: Sequence[int]) -> tf.Tensor:
        return self.own(self._sum([array])[0], sizes)

    def serve(self, arrays: Sequence[tf.Tensor], route: Route) -> list[tf.Tensor]:
        mine = route.owner == self.rank
        rows = self._sum([_chosen(mine, array) for array in arrays])
        return [self.own(each, route.sizes) for each in rows]

    def give_back(self, arrays: Sequence[tf.Tensor], route: Route) -> list[tf.Tensor]:
        return self.gather(arrays, route.sizes)

    def entries(self, owner: tf.Tensor) -> tf.Tensor:
        # Shapes must be known: every replica serves all draws, and `serve` chooses.
        return tf.range(owner.shape[0], dtype=tf.int64)

    def by_rank(self, variable: tf.Variable) -> dict[str, tf.Variable]:
        """Return the variables in which this worker's replicas hold their parts of `variable`."""
        ranks = self.strategy.experimental_distribute_values_from_function(
            lambda context: context.replica_id_in_sync_group
        )
        ranks, held = (self.strategy.experimental_local_results(x) for x in (ranks, variable))
        return {str(int(rank)): each for rank, each in zip(ranks, held, strict=True)}

    def _context(self) -> tf.distribute.ReplicaContext:
        context = tf.distribute.get_replica_context()
        if context is None or tf.distribute.get_strategy() is not self.strategy:
            raise OptionError(
                "a sharded cache is used outside its strategy: make loss and handler inside "
                "strategy.scope(), and call them in strategy.run."
            )
        return context

    def _sum(self, arrays: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Return arrays (n, …) summed over replicas; arrays of one dtype travel together."""
        context = self._context()
        # A graph runs what has its inputs: without this, workers that differ could exchange rows of
        # unequal batches before the check fails.
        graph = tf.compat.v1.get_default_graph()
        with tf.control_dependencies([check for check in self._checks if check.graph is graph]):
            sent = [tf.identity(_to_wire(array)) for array in arrays]
        found: dict[int, tf.Tensor] = {}
        for dtype in dict.fromkeys(each.dtype for each in sent):
            places = [place for place, each in enumerate(sent) if each.dtype == dtype]
            columns = [sent[place].shape[1:].num_elements() for place in places]
            rows = sent[0].shape[0]
            packed = tf.concat(
                [tf.reshape(sent[p], (rows, n)) for p, n in zip(places, columns, strict=True)], 1
            )
            summed = tf.split(context.all_reduce(tf.distribute.ReduceOp.SUM, packed), columns, 1)
            found.update(zip(places, summed, strict=True))
        return [
            _from_wire(tf.reshape(found[place], sent[place].shape), array.dtype)
            for place, array in enumerate(arrays)
        ]

    def _check_equal(self, numbers: Sequence[int | None], message: str) -> None:
        """Raise if replicas differ: while tracing, or in the step itself if workers do."""

        def check(strategy: tf.distribute.Strategy, *every: Any) -> None:
            for each in every:
                if len(set(strategy.experimental_local_results(each))) > 1:
                    raise ShapeError(message)

        self._context().merge_call(check, args=tuple(numbers))
        if self._many:
            own = tf.constant(numbers, tf.int32)
            (every,) = self.gather([own[None]], (1,) * self.count)
            check = tf.debugging.assert_equal(every, tf.broadcast_to(own, every.shape), message)
            self._checks = [] if check is None else [check]


def _at_own_place(mine: tf.Tensor, array: tf.Tensor) -> tf.Tensor:
    """Return array (n, …) at its position among those of all, with zeros elsewhere."""
    placed = _chosen(mine, tf.broadcast_to(array, (mine.shape[0], *array.shape)))
    return tf.reshape(placed, (mine.shape[0] * array.shape[0], *array.shape[1:]))


def _chosen(mask: tf.Tensor, array: tf.Tensor) -> tf.Tensor:
    return tf.where(mask_rows(mask, array), array, tf.zeros((), array.dtype))


def _to_wire(array: tf.Tensor) -> tf.Tensor:
    if array.dtype in _BITS:
        return tf.bitcast(array, tf.int32)
    return tf.cast(array, _CAST.get(array.dtype, array.dtype))


def _from_wire(array: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    return tf.bitcast(array, dtype) if dtype in _BITS else tf.cast(array, dtype)
