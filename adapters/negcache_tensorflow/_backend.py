"""The verbs that TensorFlow supplies to the core."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf
from tensorflow.python.eager import record  # there is no public way to see what a tape records

from negcache_core import KindError
from negcache_core.adapter import Backend

from . import _namespace
from ._chunks import map_chunks

# all_gather supports few dtypes: the others travel as one that holds all their values.
_WIRE = {
    **dict.fromkeys((tf.bool, tf.int8, tf.int16, tf.uint8, tf.uint16), tf.int32),
    tf.uint32: tf.int64,
    tf.uint64: tf.int64,  # the cast and its reverse keep the bits
    tf.bfloat16: tf.float32,
}


class TensorFlowBackend(Backend[Any]):
    """TensorFlow, eager or traced, with or without XLA; state is in variables."""

    name = "tensorflow"
    slices_copy = True

    def owns(self, value: Any) -> bool:
        return isinstance(value, (tf.Tensor, tf.Variable, tf.distribute.DistributedValues))

    def to_array(self, value: Any) -> tf.Tensor:
        return value if tf.is_tensor(value) else tf.convert_to_tensor(value)

    def generator_state(self, generator: tf.random.Generator) -> tuple[str, Any]:
        return f"tf.random {generator.algorithm}", generator.state.numpy().tolist()

    def set_generator_state(self, generator: tf.random.Generator, state: Any) -> None:
        generator.state.assign(state)

    def truth(self, value: tf.Tensor) -> bool | None:
        known = tf.get_static_value(value)
        return None if known is None else bool(known)

    def stop_gradient(self, array: tf.Tensor) -> tf.Tensor:
        return tf.stop_gradient(array)

    def watch_gradients(
        self, arrays: Sequence[Any], check: Callable[[Sequence[bool | None]], None]
    ) -> Sequence[Any]:
        learns = [_is_recorded(array) for array in arrays]
        if True in learns and False in learns:
            check(
                [each or _learns_unseen(array) for each, array in zip(learns, arrays, strict=True)]
            )
        return arrays

    def has_graph(self, value: Any) -> bool:
        # An eager tensor that a tape records belongs to this step, if each step makes a loss.
        if not isinstance(value, tf.Tensor) or not tf.is_symbolic_tensor(value):
            return False
        graph = tf.compat.v1.get_default_graph()  # the body of a loop is inside another
        while graph is not None and graph is not value.graph:
            graph = getattr(graph, "outer_graph", None)
        return graph is None

    def after(self, arrays: Any) -> contextlib.AbstractContextManager[Any]:
        # A graph runs whatever has its inputs, even if something else is about to fail.
        return tf.control_dependencies(
            [each for each in tf.nest.flatten(arrays) if isinstance(each, tf.Tensor)]
        )

    def slice_rows(self, array: tf.Tensor, start: Any, size: int) -> tf.Tensor:
        # Gathered: slicing a variable that is written to would first copy all of it.
        rows = tf.cast(start, tf.int64) + tf.range(size, dtype=tf.int64)
        return tf.gather(array, rows)

    def scan_tiles(
        self, function: Callable[..., Any], carry: tuple[tf.Tensor, ...], count: int
    ) -> tuple[tuple[tf.Tensor, ...], tuple[tf.Tensor, ...]]:
        if tf.executing_eagerly() or count == 1:
            return super().scan_tiles(function, carry, count)
        carry, first = function(carry, tf.constant(0, tf.int64))
        arrays = tuple(
            tf.TensorArray(part.dtype, count, element_shape=part.shape).write(0, part)
            for part in first
        )

        def body(tile: tf.Tensor, carry: Any, arrays: Any) -> Any:
            carry, parts = function(carry, tile)
            return (
                tile + 1,
                carry,
                tuple(
                    array.write(tf.cast(tile, tf.int32), part)
                    for array, part in zip(arrays, parts, strict=True)
                ),
            )

        _, carry, arrays = tf.while_loop(
            lambda tile, *_: tile < count,
            body,
            (tf.constant(1, tf.int64), carry, arrays),
            parallel_iterations=1,
        )
        # Rows and queries keep their static sizes, if they have any.
        return carry, tuple(
            tf.reshape(array.stack(), (count * part.shape[0], part.shape[1] or -1))
            for array, part in zip(arrays, first, strict=True)
        )

    def map_chunks(self, function: Callable[..., Any], arrays: Sequence[Any], size: int) -> Any:
        return map_chunks(function, arrays, size)

    def write_rows(self, table: tf.Variable, slots: tf.Tensor, rows: tf.Tensor) -> tf.Variable:
        if isinstance(table, tf.distribute.DistributedValues):
            # Such a variable has no scatter, but this replica's part of it has a handle.
            tf.raw_ops.ResourceScatterNdUpdate(
                ref=table.handle, indices=slots[:, None], updates=rows
            )
        else:
            table.scatter_nd_update(slots[:, None], rows)
        return table

    def overwrite(self, table: tf.Variable, values: tf.Tensor) -> tf.Variable:
        table.assign(values)
        return table

    def make_generator(self, seed: Any) -> tf.random.Generator:
        if isinstance(seed, tf.random.Generator):
            return seed
        if seed is None:  # follows tf.random.set_seed
            seed = tf.random.uniform((), maxval=tf.int64.max, dtype=tf.int64)
        elif isinstance(seed, bool) or not isinstance(seed, int):
            raise KindError(
                f"generator is {seed!r}: expected None, an int seed, or a tf.random.Generator."
            )
        return tf.random.Generator.from_seed(seed)

    def remember(self, generator: Any) -> Callable[[], Any] | None:
        # A trace has drawn nothing yet, and a replica cannot undo what it shares.
        drawing = isinstance(generator, tf.random.Generator)
        if not drawing or not tf.executing_eagerly() or tf.distribute.has_strategy():
            return None
        before = tf.identity(generator.state)
        return lambda: generator.state.assign(before)

    def uniform(
        self, generator: tf.random.Generator, shape: tuple[Any, ...], like: tf.Tensor
    ) -> tf.Tensor:
        del like  # TensorFlow places tensors itself
        return generator.uniform([tf.cast(size, tf.int32) for size in shape], dtype=tf.float64)

    def all_gather(self, array: tf.Tensor, group: Any = None) -> tf.Tensor:
        wire = _WIRE.get(array.dtype, array.dtype)
        gathered = tf.distribute.get_replica_context().all_gather(tf.cast(array, wire), axis=0)
        return tf.cast(gathered, array.dtype)


def _is_recorded(array: Any) -> bool:
    """Return whether a gradient tape that is active here records the uses of an array."""
    tensor = tf.convert_to_tensor(array)
    recorded: bool = record.should_record_backprop([tensor])
    return recorded


def _learns_unseen(array: Any) -> bool | None:
    """Return None for an array that a tape outside this trace may record, False otherwise.

    An argument of a traced function does not show where it comes from. So an array computed from
    one is known to be a constant only if it was also computed from something recorded: from a
    variable, with something in between that stops gradients.
    """
    if not tf.is_symbolic_tensor(array):
        return False
    captured = {inside.ref() for inside in getattr(array.graph, "internal_captures", ())}
    seen, left, argument = set(), [array], False
    while left:
        tensor = left.pop()
        if tensor.ref() in seen:
            continue
        seen.add(tensor.ref())
        if _is_recorded(tensor):
            return False
        left.extend(tensor.op.inputs)
        if tensor.op.type == "Placeholder" and tensor.ref() not in captured:
            argument |= tensor.dtype.is_floating
    return None if argument else False


TENSORFLOW = TensorFlowBackend(_namespace)
