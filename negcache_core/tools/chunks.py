"""A network that sees a large batch a few rows at a time, and keeps only one chunk in memory."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from negcache_core.arrays._array import Array
from negcache_core.arrays.backend import NUMPY, Backend
from negcache_core.arrays.validation import as_array, as_whole, check_function, shape_of
from negcache_core.errors import KindError, OptionError, ShapeError


def in_chunks(
    network: Callable[[Any], Array], size: int, *, backend: Backend = NUMPY
) -> Callable[[Any], Any]:
    """Wrap a network so that it takes its rows `size` at a time, to save memory.

    network: a function of one argument that returns an array (n, …), with a row for each row of the
             argument. Rows must not depend on each other, as they do in batch normalisation.
    size:    rows in a chunk, at least 1

    The argument is an array (n, …), or nested dicts, lists and tuples of arrays with the same first
    size n, such as a dict of features; None in it stays. The result is that of the whole batch, and
    so is the gradient, to rounding. Where gradients are taken, the backward pass computes the
    activations of a chunk again instead of keeping them: a batch of any size needs the memory of
    one chunk, and about a third more time.

    Raises KindError, OptionError or ShapeError for other arguments, and for other results of the
    network.

    >>> import numpy as np
    >>> embed = in_chunks(lambda features: features["x"] * 2.0, 2)
    >>> embed({"x": np.asarray([[1.0], [2.0], [3.0]])})
    array([[2.],
           [4.],
           [6.]])

    Source: Chen, Xu, Zhang, Guestrin, "Training Deep Nets with Sublinear Memory Cost", 2016; for a
    contrastive loss without a cache: Gao, Zhang, Han, Callan, "Scaling Deep Contrastive Learning
    Batch Size under Memory Limited Setup", 2021.
    """
    check_function(network, "network", "a function of features that returns embeddings")
    chunk = _checked_size(size)

    def chunked(rows: Any) -> Any:
        arrays: list[Array] = []
        names: list[str] = []
        layout = _flattened(rows, "the argument", arrays, names, backend)
        _check_first_sizes(arrays, names)

        def embed(*parts: Array) -> Array:
            return _checked_output(network(_nested(layout, iter(parts))), parts[0], backend)

        return backend.map_chunks(embed, arrays, chunk)

    return chunked


def _checked_size(size: Any) -> int:
    number = as_whole(size)
    if number is None:
        raise KindError(f"size is {size!r}: expected the number of rows of a chunk, an int.")
    if number < 1:
        raise OptionError(f"size is {number}: a chunk needs at least 1 row.")
    return number


def _flattened(
    value: Any, what: str, arrays: list[Array], names: list[str], backend: Backend
) -> Any:
    """Append a structure's arrays and their names; return the structure, True for each array."""
    if value is None:
        return None
    if isinstance(value, Mapping):
        return {
            key: _flattened(value[key], f"{what}[{key!r}]", arrays, names, backend) for key in value
        }
    if isinstance(value, (list, tuple)):
        parts = [
            _flattened(part, f"{what}[{place}]", arrays, names, backend)
            for place, part in enumerate(value)
        ]
        if isinstance(value, list):
            return parts
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    array = as_array(value, what, backend)
    if len(shape_of(array, what)) == 0:
        raise ShapeError(f"{what} has shape (): expected (n, …), with a first axis to split.")
    arrays.append(array)
    names.append(what)
    return True


def _nested(layout: Any, parts: Iterator[Array]) -> Any:
    """Return a structure from `_flattened` with the next of `parts` for each array."""
    if layout is True:
        return next(parts)
    if isinstance(layout, dict):
        return {key: _nested(layout[key], parts) for key in layout}
    if isinstance(layout, list):
        return [_nested(each, parts) for each in layout]
    if isinstance(layout, tuple):
        found = [_nested(each, parts) for each in layout]
        return type(layout)(*found) if hasattr(layout, "_fields") else tuple(found)
    return layout


def _check_first_sizes(arrays: Sequence[Array], names: Sequence[str]) -> None:
    if not arrays:
        raise ShapeError(
            "the argument has no array in it: expected at least one, with rows to split."
        )
    known = None
    for place, array in enumerate(arrays):
        rows = array.shape[0]
        if rows is None:
            continue
        if known is not None and arrays[known].shape[0] != rows:
            raise ShapeError(
                f"{names[known]} has {arrays[known].shape[0]} rows and {names[place]} has "
                f"{rows}: expected the same number in each, because chunks are taken from the "
                "first axis."
            )
        if known is None:
            known = place


def _checked_output(output: Any, like: Array, backend: Backend) -> Array:
    """Return the network's output for a chunk; raise unless it has one row per input row."""
    if not hasattr(output, "shape") or not hasattr(output, "dtype"):
        raise KindError(
            f"the network returned a {type(output).__name__}: expected one array, with a row for "
            "each input row. Take the embeddings out of it: lambda rows: network(rows)[0]."
        )
    array = as_array(output, "what the network returned", backend)
    shape, rows = shape_of(array, "what the network returned"), like.shape[0]
    if not shape or (shape[0] is not None and rows is not None and shape[0] != rows):
        raise ShapeError(
            f"the network returned shape {shape} for a chunk of {rows} rows: expected "
            f"({rows}, D), one embedding a row."
        )
    return array
