"""Run rows through a function a chunk at a time, and again in the backward pass.

This does not use tf.recompute_grad per chunk: TensorFlow would keep what a loop of those
differentiates, and tensors that the function closes over would get no gradient. Here the whole loop
has one gradient, itself a loop. So any number of rows, even one unknown while tracing, takes one
small graph and the memory of one chunk.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import tensorflow as tf
from tensorflow.python.eager import context, record, tape  # there is no public way to read these
from tensorflow.python.framework import op_callbacks  # nor to see what a call does

from negcache_core import OptionError


def map_chunks(function: Callable[..., Any], arrays: Sequence[Any], size: int) -> Any:
    """Implement `Backend.map_chunks`."""
    eager = tf.executing_eagerly()
    cut = _Cut([tf.convert_to_tensor(array) for array in arrays], size)
    heads = [cut.head(array) for array in cut.arrays]
    if eager and not record.could_possibly_record():
        return _forward(function, cut, function(*heads))
    # Recorded, because otherwise a tf.function reports no variables.
    with _Watched(heads) as watched:
        first = function(*heads)
    with record.stop_recording():
        first = tf.identity(first)  # and the tape forgets it together with the original tensor
    watched.refuse_what_cannot_be_repeated()
    closed_over = watched.closed_over()

    def run(*inputs: Any) -> tuple[Any, Callable[..., Any]]:
        del inputs  # the same tensors as outside the function
        for variable in watched.variables:
            tape.variable_accessed(variable)  # in the first chunk
        with record.stop_recording() if eager else contextlib.nullcontext():
            output = _forward(function, cut, first)

        def gradient(upstream: Any, variables: Sequence[Any] | None = None) -> Any:
            others = [*closed_over, *(variables or ())]
            found = _backward(function, cut, tf.convert_to_tensor(upstream), others)
            mine = [next(found) if array.dtype.is_floating else None for array in cut.arrays]
            mine += [next(found) for _ in closed_over]
            return (mine, list(found)) if variables else mine

        return output, gradient

    return tf.custom_gradient(run)(*cut.arrays, *closed_over)


class _Cut:
    """How the rows of `arrays` are split: the first chunk is the short one.

    So all others have a known size, and the first shows what the function returns.
    """

    def __init__(self, arrays: Sequence[Any], size: int) -> None:
        self.arrays, self.size = arrays, size
        rows = arrays[0].shape[0]
        self.known = rows is not None
        if not self.known:
            rows = tf.shape(arrays[0])[0]
            for each in arrays[1:]:  # a longer one would be truncated silently
                tf.debugging.assert_equal(tf.shape(each)[0], rows)
        self.others = ((max(rows, 1) if self.known else tf.maximum(rows, 1)) - 1) // size
        self.first = rows - self.others * size

    def head(self, array: Any) -> Any:
        """Return the first chunk of an array."""
        return array[: self.first]

    def chunk(self, array: Any, chunk: Any) -> Any:
        """Return one of the other chunks of an array."""
        return tf.gather(array, self.first + chunk * self.size + tf.range(self.size))

    def loop(self, body: Callable[..., Any], carry: Any) -> Any:
        """Return `carry` after body(chunk, carry) ran over the other chunks."""
        if self.known and (tf.executing_eagerly() or self.others < 2):
            for chunk in range(self.others):
                carry = body(chunk, carry)
            return carry
        return tf.while_loop(
            lambda chunk, _: chunk < self.others,
            lambda chunk, carry: (chunk + 1, body(chunk, carry)),
            (tf.constant(0), carry),
            parallel_iterations=1,
            maximum_iterations=self.others,
        )[1]

    def parts(self, first: Any) -> Any:
        """Return space for the results of the other chunks, shaped like the first one's."""
        shape = (self.size, *first.shape[1:])
        if self.known:
            return tf.TensorArray(first.dtype, self.others, element_shape=shape)
        # One, even if there is none: an empty array could not be read if a size is unknown.
        parts = tf.TensorArray(first.dtype, tf.maximum(self.others, 1), element_shape=shape)
        sizes = tf.concat([[self.size], tf.shape(first)[1:]], 0)
        return parts.write(0, tf.zeros(sizes, first.dtype))

    def joined(self, first: Any, parts: Any) -> Any:
        """Return the rows of all chunks."""
        if self.known and self.others == 0:
            return first
        sizes = tf.concat([[self.others * self.size], tf.shape(first)[1:]], 0)
        rows = tf.concat([first, tf.reshape(parts.stack()[: self.others], sizes)], 0)
        return tf.ensure_shape(rows, (self.arrays[0].shape[0], *first.shape[1:]))


def _forward(function: Callable[..., Any], cut: _Cut, first: Any) -> Any:
    def body(chunk: Any, parts: Any) -> Any:
        return parts.write(chunk, function(*[cut.chunk(array, chunk) for array in cut.arrays]))

    return cut.joined(first, cut.loop(body, cut.parts(first)))


def _backward(
    function: Callable[..., Any], cut: _Cut, upstream: Any, others: Sequence[Any]
) -> Iterator[Any]:
    """Return the gradients of the floating arrays, then those of other tensors and variables."""

    def gradients(take: Callable[[Any], Any]) -> tuple[list[Any], list[Any]]:
        chunks = [take(array) for array in cut.arrays]
        leaves = [chunk for chunk in chunks if chunk.dtype.is_floating]
        with tf.GradientTape(watch_accessed_variables=False) as inner:
            inner.watch([*leaves, *others])
            output = function(*chunks)
        found = inner.gradient(
            output,
            [*leaves, *others],
            output_gradients=take(upstream),
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )
        return found[: len(leaves)], found[len(leaves) :]

    def body(chunk: Any, carry: Any) -> Any:
        parts, sums = carry
        rows, more = gradients(lambda array: cut.chunk(array, chunk))
        return (
            [each.write(chunk, row) for each, row in zip(parts, rows, strict=True)],
            [_sum(each, one) for each, one in zip(sums, more, strict=True)],
        )

    first, sums = gradients(cut.head)
    if not tf.executing_eagerly():
        sums = [tf.convert_to_tensor(each) for each in sums]  # a loop cannot carry sparse ones
    parts, sums = cut.loop(body, ([cut.parts(each) for each in first], sums))
    rows = [cut.joined(each, part) for each, part in zip(first, parts, strict=True)]
    return iter([*rows, *sums])


def _sum(left: Any, right: Any) -> Any:
    """Return left + right, sparse if both are, as gradients of a table's rows are."""
    if isinstance(left, tf.IndexedSlices) and isinstance(right, tf.IndexedSlices):
        return tf.IndexedSlices(
            tf.concat([left.values, right.values], 0),
            tf.concat([left.indices, right.indices], 0),
            left.dense_shape,
        )
    return tf.convert_to_tensor(left) + tf.convert_to_tensor(right)


class _Watched:
    """What a function does in this context: which outside tensors it reads, and what it changes.

    heads: its own arguments
    """

    def __init__(self, heads: Sequence[Any]) -> None:
        self._graph = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
        self._before = 0 if self._graph is None else len(self._graph.get_operations())
        self._inside = {_id_of(each) for each in heads}
        self._outside: dict[int, Any] = {}
        self._done: set[str] = set()
        self._watcher = record.VariableWatcher()
        self.variables: Sequence[Any] = ()

    def __enter__(self) -> Self:
        self._watcher.__enter__()
        if self._graph is None:
            op_callbacks.add_op_callback(self._executed)
        return self

    def __exit__(self, *error: object) -> None:
        self._watcher.__exit__(*error)
        self.variables = self._watcher.watched_variables()
        if self._graph is None:
            op_callbacks.remove_op_callback(self._executed)
            return
        for operation in self._graph.get_operations()[self._before :]:
            self._done.update((operation.type, *_called(operation.node_def)))
            if operation.type != "Placeholder":  # which represents what is read from outside
                self._note(operation.inputs, operation.outputs)

    def _executed(
        self, kind: Any, inputs: Any, attributes: Any, outputs: Any, *names: Any, **more: Any
    ) -> None:
        del attributes, names, more
        self._done.add(tf.compat.as_str(kind))  # the name of a function, in bytes
        self._note(inputs, outputs)

    def _note(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        for each in inputs:
            if each.dtype.is_floating and _id_of(each) not in self._inside:
                self._outside[_id_of(each)] = each
        self._inside.update(_id_of(each) for each in outputs)

    def closed_over(self) -> list[Any]:
        """Return the floating tensors that a gradient may have to reach."""
        known = record.could_possibly_record()  # otherwise a tape may be outside this trace
        return [
            each
            for each in self._outside.values()
            if not known or record.should_record_backprop([each])
        ]

    def refuse_what_cannot_be_repeated(self) -> None:
        """Raise OptionError if a second run would draw or read something else."""
        done = _operations(self._done)
        for beginnings, does in ((_DRAWS, "draws random numbers"), (_WRITES, "writes a variable")):
            found = sorted(each for each in done if each.startswith(beginnings))
            if found:
                raise OptionError(
                    f"the network {does} ({', '.join(found)}), as dropout layers and batch "
                    "normalisation do in training: recomputed for the gradient, its output "
                    "would differ. Call it with training=False, or draw with "
                    "tf.random.stateless_* from seeds (n, 2) in the features."
                )


_DRAWS = (
    *("Random", "Rng", "Multinomial", "TruncatedNormal", "ParameterizedTruncatedNormal"),
    *("StatefulRandom", "StatefulStandardNormal", "StatefulTruncatedNormal", "StatefulUniform"),
    "NonDeterministicInts",
)
_WRITES = ("Assign", "ResourceScatter")


def _id_of(tensor: Any) -> int:
    """Return a number that no other tensor has, even after this one is gone."""
    number: int = tensor._id  # noqa: SLF001 - tapes know tensors by it
    return number


def _operations(done: set[str]) -> set[str]:
    """Return kinds of operations, including those inside the functions among them."""
    found, left = set(), list(done)
    known = context.context()
    while left:
        name = left.pop()
        if name in found:
            continue
        found.add(name)
        if known.has_function(name):
            for node in known.get_function_def(name).node_def:
                left += (node.op, *_called(node))
    return found


def _called(node: Any) -> list[str]:
    """Return the names of the functions that an operation calls, such as a loop's body."""
    values = node.attr.values()
    functions = [value.func for value in values] + [
        one for each in values for one in each.list.func
    ]
    return [function.name for function in functions if function.name]
