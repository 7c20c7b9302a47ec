"""The interface to array libraries: the only file that imports array-api-compat.

The core is written against the array-API standard. What the standard lacks, or has only in a slow
form, is listed in `EXTRAS`: a library may supply any of these; `completed` adds the rest.
It is longer than most files, because no other file may depend on a particular array library.
"""

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import array_api_compat
import array_api_compat.numpy
import numpy as np

from negcache_core.errors import DTypeError, KindError


class Array(Protocol):  # noqa: PLW1641 - whether arrays have a hash is their library's affair
    """What the core assumes of an array, whatever its library.

    Functions of arrays come from a namespace `xp`. A comparison, like arithmetic, is elementwise.
    """

    @property
    def shape(self) -> Any:
        """The sizes, None where tracing leaves one unknown."""

    @property
    def dtype(self) -> Any:
        """The library's own dtype object; `dtype_name` reads it."""

    @property
    def device(self) -> Any:
        """The device it is on, for libraries where that matters."""

    def __getitem__(self, key: Any, /) -> Any: ...
    def __setitem__(self, key: Any, value: Any, /) -> None: ...  # where `write_rows` is in place
    def __add__(self, other: Any, /) -> Any: ...
    def __sub__(self, other: Any, /) -> Any: ...
    def __mul__(self, other: Any, /) -> Any: ...
    def __truediv__(self, other: Any, /) -> Any: ...
    def __floordiv__(self, other: Any, /) -> Any: ...
    def __mod__(self, other: Any, /) -> Any: ...
    def __pow__(self, other: Any, /) -> Any: ...
    def __radd__(self, other: Any, /) -> Any: ...
    def __rsub__(self, other: Any, /) -> Any: ...
    def __rmul__(self, other: Any, /) -> Any: ...
    def __bool__(self) -> bool: ...
    def __int__(self) -> int: ...
    def __float__(self) -> float: ...
    def __neg__(self) -> Any: ...
    def __invert__(self) -> Any: ...
    def __and__(self, other: Any, /) -> Any: ...
    def __or__(self, other: Any, /) -> Any: ...
    def __lt__(self, other: Any, /) -> Any: ...
    def __le__(self, other: Any, /) -> Any: ...
    def __gt__(self, other: Any, /) -> Any: ...
    def __ge__(self, other: Any, /) -> Any: ...
    def __eq__(self, other: Any, /) -> Any: ...
    def __ne__(self, other: Any, /) -> Any: ...


if TYPE_CHECKING:
    from typing_extensions import TypeVar  # in `typing` a type variable's default takes Python 3.13

    ArrayT = TypeVar("ArrayT", bound=Array, default=Any)
else:
    from typing import TypeVar

    ArrayT = TypeVar("ArrayT")


EXTRAS = {
    "index_dtype": "the dtype of positions: int64, or int32 in JAX without x64",
    "device_of": "(array): what `device=` of arange and full takes to put the result on its device",
    "dynamic_length": "(array, axis): a size that tracing leaves unknown, as a scalar tensor",
    "matmul_transposed": "(left, right): left @ right.T, for left (B, D) and right (C, D)",
    "take_rows": "(array, indices): a copy of the rows at indices (n,), never a view",
    "put_rows": "(table, slots, rows): a copy of table with rows (n, …) at slots (n,); where a "
    "slot is named twice its rows are equal, as scatters have no defined order",
    "exp_difference": "(left, right): exp(left - right), written into left; for libraries that can",
    "largest": "(values, count): the positions of the count largest integers, in order; ties go "
    "to the lowest position",
}
"""What a namespace has besides the array API. An adapter may bring these, and nothing else."""


class Namespace:
    """An array library's functions with all of EXTRAS."""

    def __init__(self, library: Any, extras: dict[str, Any]) -> None:
        self.__name__ = getattr(library, "__name__", str(library))
        functions = {key: getattr(library, key) for key in dir(library) if key[0] != "_"}
        self.__dict__.update({**extras, **functions})

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{self.__name__} has no {name}.")


@functools.lru_cache
def completed(library: Any) -> Any:
    """Return a library's namespace, with the EXTRAS that it lacks built from the standard."""

    def put_rows(table: Array, slots: Array, rows: Array) -> Array:
        return _put_rows_by_bisection(table, slots, rows, xp)

    extras = {
        "index_dtype": getattr(library, "index_dtype", None) or library.arange(1).dtype,
        "device_of": array_api_compat.device,
        "dynamic_length": _no_dynamic_length,
        "matmul_transposed": lambda left, right: left @ xp.matrix_transpose(right),
        "take_rows": lambda array, indices: xp.take(array, indices, axis=0),
        "put_rows": put_rows,
        "exp_difference": lambda left, right: xp.exp(xp.subtract(left, right, out=left), out=left),
        "largest": lambda values, count: xp.argsort(values, descending=True, stable=True)[:count],
    }
    xp: Any = Namespace(library, extras)
    if library is array_api_compat.numpy:
        xp.__dict__.update(_NUMPY)
    return xp


def namespace(*arrays: Array, xp: Any = None) -> Any:
    """Return `xp`, or else the namespace of `arrays`, completed; raise KindError for neither."""
    if isinstance(xp, Namespace):
        return xp
    if xp is not None:
        if not hasattr(xp, "asarray"):
            raise KindError(f"xp is {xp!r}: expected an array library's namespace, or None.")
        return completed(xp)
    try:
        return completed(array_api_compat.array_namespace(*arrays))
    except TypeError as error:
        given = ", ".join(type(array).__name__ for array in arrays)
        raise KindError(
            f"cannot infer an array-API namespace from ({given}): pass arrays of one library, or "
            "the namespace as xp= (TensorFlow has none of its own: use negcache_tensorflow)."
        ) from error


def dtype_name(dtype: Any) -> str:
    """Return a dtype's name without its library: 'float32' for torch.float32, np.float32, ….

    >>> import numpy as np
    >>> dtype_name(np.float32), dtype_name(np.dtype("int64")), dtype_name("bool")
    ('float32', 'int64', 'bool')
    """
    if isinstance(dtype, str):
        return dtype
    name = getattr(dtype, "name", None) or getattr(dtype, "__name__", None) or str(dtype)
    return str(name).rpartition(".")[2]


def dtype_kind(dtype: Any) -> str:
    """Return 'bool', 'integer', 'floating', or the dtype's name where it is none of these."""
    name = dtype_name(dtype)
    if name == "bool":
        return "bool"
    if name.removeprefix("u") in {"int8", "int16", "int32", "int64"}:
        return "integer"
    if name in {"float16", "bfloat16", "float32", "float64"}:
        return "floating"
    return name


def native_dtype(dtype: Any, xp: Any) -> Any:
    """Return the namespace's own dtype object for `dtype` (an object of any library, or a name)."""
    name = dtype_name(dtype)
    native = getattr(xp, name, None)
    if native is not None:
        return native
    if isinstance(dtype, str) or dtype_kind(dtype) == name:
        title = str(getattr(xp, "__name__", xp)).rpartition(".")[2]
        raise DTypeError(
            f"dtype {name!r} is not available in {title}: choose another dtype for the field."
        )
    return dtype  # an extension dtype, such as ml_dtypes.bfloat16 for NumPy


def accumulation_dtype(*arrays: Array, xp: Any) -> Any:
    """Return the dtype to compute in: the widest of `arrays`, and at least float32."""
    for array in arrays:
        if array.dtype == xp.float64:
            return xp.float64
    return xp.float32


def length(array: Array, xp: Any, axis: int = 0) -> Any:
    """Return a size as a plain int, or as a scalar tensor where tracing leaves it unknown."""
    size = array.shape[axis]
    return xp.dynamic_length(array, axis) if size is None else size


def cast(array: Array, dtype: Any, xp: Any) -> Any:
    """Return `array` in `dtype`; the same array, not a copy, if it already has it."""
    return array if array.dtype == dtype else xp.astype(array, dtype)


def take_columns(array: Array, columns: Array, xp: Any) -> Any:
    """Return array[i, columns[i, k]] for array (B, n) and columns (B, S): (B, S)."""
    flat = positions(array, xp)[:, None] * array.shape[1] + columns
    chosen = xp.take_rows(xp.reshape(array, (-1,)), xp.reshape(flat, (-1,)))
    return xp.reshape(chosen, (-1, columns.shape[1]))


def arange_like(count: Any, like: Array, xp: Any) -> Any:
    """Return 0, 1, …, count - 1 on the device of `like`."""
    return xp.arange(count, dtype=xp.index_dtype, device=xp.device_of(like))


def positions(array: Array, xp: Any) -> Any:
    """Return 0, 1, …, n - 1 for `array` (n, …), on its device."""
    size = array.shape[0]
    count = xp.dynamic_length(array, 0) if size is None else size
    return xp.arange(count, dtype=xp.index_dtype, device=xp.device_of(array))


def fill(shape: tuple[int, ...], value: Any, like: Array, xp: Any) -> Any:
    """Return an array filled with `value`, with the dtype and the device of `like`."""
    return xp.full(shape, value, dtype=like.dtype, device=xp.device_of(like))


def concat_rows(parts: Sequence[tuple[Array, ...]], xp: Any) -> tuple[Any, ...]:
    """Concatenate the first members of all parts, then the second ones, …."""
    if len(parts) == 1:
        return parts[0]
    return tuple(xp.concat(list(each), axis=0) for each in zip(*parts, strict=True))


def mask_rows(mask: Array, array: Array) -> Any:
    """Reshape a row mask (n,) so that it broadcasts over `array` (n, …)."""
    return mask[(slice(None),) + (None,) * (len(array.shape) - 1)]


def largest(values: Array, count: Any, xp: Any) -> Any:
    """Return what `xp.largest` does, but faster if few of many values are wanted.

    One pass finds the best of each group of values; only the groups with the `count` highest bests
    can hold one of the largest, and only those are searched again.
    """
    groups, rest = divmod(values.shape[0], GROUP)
    known = isinstance(count, int)
    if known and 2 * count >= groups:
        return xp.largest(values, count)
    whole = xp.reshape(values[: groups * GROUP], (groups, GROUP))
    few = count if known else xp.minimum(count, groups)
    # In ascending order, so that ties still go to the lowest position.
    held = xp.sort(xp.largest(xp.max(whole, axis=1), few))
    places = held[:, None] * GROUP + arange_like(GROUP, held, xp)[None, :]
    places = xp.concat([xp.reshape(places, (-1,)), groups * GROUP + arange_like(rest, held, xp)])
    return xp.take_rows(places, xp.largest(xp.take_rows(values, places), count))


GROUP = 128


def largest_by_keys(select: Callable[[Any, int], Any], values: Array, count: int, xp: Any) -> Any:
    """Return what `xp.largest` does, by a partial sort, which does not order ties.

    select: (keys, count) -> the positions of the count largest of distinct keys, in order

    So the position goes into the key.
    """
    size = values.shape[0]
    keys = cast(values, xp.int64, xp) * size + (size - 1 - positions(values, xp))
    return select(keys, count)


def _no_dynamic_length(array: Array, axis: int) -> Any:
    raise DTypeError(f"axis {axis} of an array of shape {array.shape} has no known size.")


def _put_rows_by_bisection(table: Array, slots: Array, rows: Array, xp: Any) -> Any:
    """Find each slot's row by bisection: the standard has no scatter."""
    if math.prod(slots.shape) == 0:
        return xp.asarray(table, copy=True)
    order = xp.argsort(slots)
    ordered = slots[order]
    every = positions(table, xp)
    place = xp.searchsorted(ordered, every)
    place = xp.where(place < slots.shape[0], place, slots.shape[0] - 1)
    hit = ordered[place] == every
    return xp.where(mask_rows(hit, table), xp.take_rows(rows, order[place]), table)


def _numpy_put_rows(table: Any, slots: Any, rows: Any) -> Any:
    copy = table.copy()
    copy[slots] = rows
    return copy


def _numpy_largest(values: Any, count: int) -> Any:
    return largest_by_keys(_numpy_select, values, count, numpy_namespace)


def _numpy_select(keys: Any, count: int) -> Any:
    size = keys.shape[0]
    inside = 0 < count < size
    chosen = np.argpartition(keys, size - count)[size - count :] if inside else np.arange(size)
    return chosen[np.argsort(-keys[chosen])][:count]


# NumPy's own reductions go through several Python functions each.
_NUMPY = {
    "sum": functools.partial(np.add.reduce, axis=None),
    "max": functools.partial(np.maximum.reduce, axis=None),
    "any": functools.partial(np.logical_or.reduce, axis=None),
    "arange": np.arange,
    "device_of": operator.attrgetter("device"),
    "matmul_transposed": lambda left, right: left @ right.T,
    "take_rows": functools.partial(np.ndarray.take, axis=0),
    "put_rows": _numpy_put_rows,
    "largest": _numpy_largest,
}

numpy_namespace: Any = completed(array_api_compat.numpy)
