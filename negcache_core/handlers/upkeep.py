"""Upkeep outside of steps: filling a cache before training, and embedding its oldest rows anew."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from negcache_core.arrays._array import Array, cast, index_dtype, take
from negcache_core.arrays.validation import as_whole, check_function, embeddings_of
from negcache_core.cache.manager import UpdatePlan
from negcache_core.cache.named import SINGLE
from negcache_core.cache.plans import oldest_written, plan_reembed
from negcache_core.cache.row_checks import check_rows
from negcache_core.cache.state import NegativeCache
from negcache_core.errors import CapacityError, KindError, OptionError
from negcache_core.handlers.checkpoint import Checkpointed

ItemNetwork = Callable[[dict[str, Array]], Array]


Progress = Callable[[Iterable[Any]], Iterable[Any]]


class Upkeep(Checkpointed):
    """What a handler does beside its steps. Nothing here is recorded for differentiation.

    The item network runs in whatever mode it is in: put a tower with dropout or batch statistics
    into evaluation mode first (PyTorch: `tower.eval()`), and back into training mode afterwards.

    >>> import numpy as np
    >>> from negcache_core import CacheClassificationLoss, CacheLossHandler, CacheManager, FieldSpec
    >>> specs = {"x": FieldSpec((1,), "float32"), "embedding": FieldSpec((1,), "float32")}
    >>> handler = CacheLossHandler(
    ...     CacheManager(specs, cache_size=4), CacheClassificationLoss("embedding", ("x",)),
    ...     embedding_key="embedding", data_keys=("x",))
    >>> corpus = {"x": np.asarray([[1.0], [2.0], [3.0]], dtype=np.float32)}
    >>> int(handler.prefill(lambda features: 2 * features["x"], corpus, batch_size=2))
    0
    >>> int(handler.refresh(lambda features: -features["x"], 2))
    0
    >>> handler.cache.data["embedding"][:, 0]
    array([-1., -2.,  6.,  0.], dtype=float32)
    """

    def refresh(self, item_network: ItemNetwork, n: int) -> Array:
        """Embed the n oldest written rows anew; return how many were left out as not finite.

        item_network: data_keys -> (n, …), rows of the cache -> embeddings (n, D)
        n:            rows to embed, 0 <= n <= C; of equal ages the lowest slots

        Their age becomes 0, that of a new row, whatever `use_lru` is: so the next call goes on
        with other rows, and they leave the cache later. No other row grows older: this is no step.
        With a capacity of the whole corpus and a refresh every step this is the paper's algorithm
        for a cache that is not streaming (section 3.2).

        A row whose fresh embedding is not finite keeps the old one and its age: it is first in
        line again, to be embedded and to be overwritten by a new item. Where fewer than n rows are
        written, the oldest stands in for the rest. An empty cache is left alone; in a traced
        function, which cannot see that it is empty, the network gets rows of zeros and its
        output is dropped. With `use_cross_replica`, every replica writes the embeddings of the
        first. Cost: the network on n rows, and one pass over the ages.

        JAX: `state = handler.refresh(state, item_network, n)`, with no count.

        Raises CapacityError if n > C, KindError or OptionError if n is no such number, and
        ShapeError or DTypeError for a wrong output. Any exception leaves the cache as it was.
        """
        return self._refresh(tuple(self._managers), item_network, n)

    def prefill(
        self,
        item_network: ItemNetwork,
        features: Mapping[str, Any],
        batch_size: int,
        *,
        progress: Progress | None = None,
    ) -> Array:
        """Fill the cache from a corpus; return how many rows were left out as not finite.

        item_network: data_keys -> (n, …) -> embeddings (n, D), for n <= batch_size
        features:     field -> (N, …), every field of the cache but the embedding, N <= C
        batch_size:   rows to embed at a time; the last batch may be smaller
        progress:     None, or a function that wraps the list of batches, such as tqdm.tqdm

        Rows enter as new items do: past `new_items_filter`, to their own slot if the manager has a
        `unique_key`, else into empty slots and then over the oldest. Afterwards they are equally
        young, all of age 0, and all other rows are as old as they were. If the network raises, the
        batches before it are in the cache. Runs eagerly: it is a Python loop. With
        `use_cross_replica`, give every replica the same features; the first's embeddings count.

        JAX: `state = handler.prefill(state, item_network, features, batch_size)`, with no count.

        Raises CapacityError if N > C, KindError or OptionError for a wrong batch_size or progress,
        and KeysError, ShapeError or DTypeError for wrong features, before the network runs.
        """
        return self._prefill({SINGLE: features}, item_network, batch_size, progress)

    def _refresh(self, names: Collection[str], item_network: ItemNetwork, n: int) -> Array:
        """Refresh n rows of each cache that is named; nothing is written before all is planned."""
        count, caches = _whole("n", n, least=0), self._caches()
        check_function(item_network, "item_network", "a function of features")
        for name in names:
            capacity = caches[name].age.shape[0]
            if count > capacity:
                raise CapacityError(
                    f"n is {count} and the cache has {capacity} slots: expected at most all of "
                    "them. Lower n."
                )
        with self.backend.no_gradient():
            plans, left_out = {}, 0
            for name in names:
                plans[name], more = self._plan_refresh(name, item_network, count)
                left_out = left_out + more
            self._carry_out(plans)
        return left_out

    def _plan_refresh(
        self, name: str, item_network: ItemNetwork, count: int
    ) -> tuple[UpdatePlan | None, Array]:
        """Return the plan of one cache's refresh, None for nothing, and the rows left out."""
        backend, xp, cache = self.backend, self.backend.xp, self._caches()[name]
        age = cast(cache.age, xp.int32, xp)
        slots, live = oldest_written(age, count, xp=xp)
        if count == 0 or backend.truth(xp.any(live)) is False:
            return None, self._count(live)
        rows = {key: take(cache.data[key], slots, xp) for key in self.data_keys}
        embeddings = self._embed(item_network, rows, cache, count)
        finite = self._finite(embeddings, cache)
        plan = plan_reembed(age, slots, live, finite, xp=xp)
        return UpdatePlan((plan, {self.embedding_key: embeddings}), None, plan.age), self._count(
            live & ~finite
        )

    def _prefill(
        self,
        features: Mapping[str, Mapping[str, Any]],
        item_network: ItemNetwork,
        batch_size: int,
        progress: Progress | None,
    ) -> Array:
        """Fill the caches that `features` names."""
        size = _whole("batch_size", batch_size, least=1)
        check_function(item_network, "item_network", "a function of features")
        if progress is not None:
            advice = "a function that wraps an iterable, such as tqdm.tqdm, or None"
            check_function(progress, "progress", advice)
        corpora = {name: self._corpus(name, given) for name, given in features.items()}
        batches = [
            _Batch(name, slice(start, min(start + size, total)))
            for name, (_, total) in corpora.items()
            for start in range(0, total, size)
        ]
        left_out = 0
        with self.backend.no_gradient():
            try:
                for name, part in batches if progress is None else _wrapped(progress, batches):
                    rows = {key: value[part, ...] for key, value in corpora[name][0].items()}
                    left_out = left_out + self._insert(name, rows, item_network, part)
            finally:
                self._settle(corpora)
        return left_out

    def _corpus(self, name: str, features: Any) -> tuple[dict[str, Array], int]:
        """Check the features to fill a cache with; return them in its dtypes, and their number."""
        cache, backend = self._caches()[name], self.backend
        given = self._stored_features(cache, features)

        def too_many(total: int, capacity: int) -> CapacityError:
            return CapacityError(
                f"cannot prefill {total} rows into a cache of {capacity} slots: rows would "
                "overwrite one another. Raise cache_size, or pass fewer rows."
            )

        rows, total = check_rows(given, cache, "features", backend, too_many)
        if not isinstance(total, int):
            raise OptionError(
                "features have an unknown number of rows: prefill runs eagerly. Call it outside of "
                "tf.function, or give the features a static shape."
            )
        return {
            key: cast(row, cache.data[key].dtype, backend.xp) for key, row in rows.items()
        }, total

    def _insert(
        self, name: str, rows: dict[str, Array], item_network: ItemNetwork, part: slice
    ) -> Array:
        """Embed and insert one batch at age -1, below any other; return the rows left out."""
        cache = self._caches()[name]
        inputs = {key: rows[key] for key in self.data_keys}
        embeddings = self._embed(item_network, inputs, cache, part.stop - part.start)
        new_items = self._new_items(name, embeddings, rows)
        mask = self._new_items_mask(cache, new_items)
        write = self._managers[name].plan_new_items(cache, new_items, mask)
        self._carry_out({name: UpdatePlan(None, write, write[0].age)})
        return self._count(~self._finite(embeddings, cache))

    def _settle(self, names: Iterable[str]) -> None:
        """Give the rows of a prefill, at age -1, the age 0.

        They were at -1 so that no batch overwrote the rows of one before it, also in a cache that
        held other rows of age 0.
        """
        caches, xp = dict(self._caches()), self.backend.xp
        for name in names:
            data, age = caches[name]
            age = self.backend.overwrite(age, xp.where(age < 0, 0, age))
            caches[name] = NegativeCache(data, age)
        self._keep(caches)

    def _embed(
        self, item_network: ItemNetwork, rows: dict[str, Array], cache: NegativeCache, count: int
    ) -> Array:
        """Return embeddings (count, D) as constants, checked."""
        what, width = "the item network's output", cache.data[self.embedding_key].shape[1]
        fresh = embeddings_of(
            item_network(rows), (count, width), what, self.backend, like=cache.age
        )
        fresh = self.backend.stop_gradient(fresh)
        if self.use_cross_replica:  # equal also where the network draws random numbers
            fresh = self.backend.all_gather(fresh, self.group)[:count]
        return fresh

    def _count(self, mask: Array) -> Array:
        xp = self.backend.xp
        return xp.sum(cast(mask, index_dtype(xp), xp))


class _Batch(NamedTuple):
    name: str
    part: slice


def _wrapped(progress: Progress, batches: list[_Batch]) -> Iterator[_Batch]:
    """Yield what `progress` makes of the batches; raise KindError unless it is these."""
    wrapped = progress(batches)
    if not isinstance(wrapped, Iterable):
        raise KindError(f"progress returned {wrapped!r}: expected the batches, as tqdm.tqdm does.")
    for batch in wrapped:
        if not isinstance(batch, _Batch):
            raise KindError(f"progress gave {batch!r}: expected the batches that it was given.")
        yield batch


def _whole(what: str, number: Any, *, least: int) -> int:
    """Return `number` as an int; raise unless it is one, and at least `least`."""
    whole = as_whole(number)
    if whole is None:
        raise KindError(f"{what} is {number!r}: expected a plain int, known before any tracing.")
    if whole < least:
        raise OptionError(f"{what} is {number}: expected at least {least}.")
    return whole
