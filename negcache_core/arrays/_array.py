"""The door to array libraries: the only file that imports array-api-compat.

The core is written against the array-API standard. What the standard lacks (an ordered
top-k, a scatter of rows, sizes that are unknown while tracing) is one function each here. A
namespace may bring its own version under the same name, as the TensorFlow adapter's does.
"""

import math
from collections.abc import Sequence
from typing import Any

import array_api_compat
import array_api_compat.numpy as numpy_namespace

from negcache_core.errors import DTypeError, KindError

__all__ = [
    "Array",
    "accumulation_dtype",
    "arange_like",
    "cast",
    "concat_rows",
    "dtype_kind",
    "dtype_name",
    "fill",
    "index_dtype",
    "largest",
    "length",
    "mask_rows",
    "matmul_transposed",
    "namespace",
    "native_dtype",
    "numpy_namespace",
    "positions",
    "put_rows",
    "take",
    "take_columns",
]

Array = Any  # any array-API array, or a tensor whose namespace is passed as `xp`


def namespace(*arrays: Array, xp: Any = None) -> Any:
    """Return `xp`, or else the array-API namespace of `arrays`; raise KindError for neither."""
    if xp is not None:
        if not hasattr(xp, "asarray"):
            raise KindError(f"xp is {xp!r}: expected an array library's namespace, or None.")
        return xp
    try:
        return array_api_compat.array_namespace(*arrays)
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
        raise DTypeError(
            f"dtype {name!r} is not available in {_title(xp)}: choose another dtype for the field."
        )
    return dtype  # an extension dtype, such as ml_dtypes.bfloat16 for NumPy


def _title(xp: Any) -> str:
    return str(getattr(xp, "__name__", xp)).rpartition(".")[2]


def accumulation_dtype(*arrays: Array, xp: Any) -> Any:
    """Return the dtype to compute in: the widest of `arrays`, and at least float32."""
    wide = any(dtype_name(array.dtype) == "float64" for array in arrays)
    return xp.float64 if wide else xp.float32


def index_dtype(xp: Any) -> Any:
    """Return the namespace's default dtype for positions (int32 in JAX without x64)."""
    return xp.index_dtype if hasattr(xp, "index_dtype") else xp.arange(1).dtype


def length(array: Array, xp: Any, axis: int = 0) -> Any:
    """Return a size as a plain int, or as a scalar tensor where tracing leaves it unknown."""
    size = array.shape[axis]
    return xp.dynamic_length(array, axis) if size is None else size


def cast(array: Array, dtype: Any, xp: Any) -> Array:
    """Return `array` in `dtype`; the very same array, not a copy, where it already is."""
    return array if array.dtype == dtype else xp.astype(array, dtype)


def matmul_transposed(left: Array, right: Array, xp: Any) -> Array:
    """Return `left @ right.T` for left (B, D) and right (C, D)."""
    if hasattr(xp, "matmul_transposed"):
        return xp.matmul_transposed(left, right)
    return xp.matmul(left, xp.matrix_transpose(right))


def take(array: Array, indices: Array, xp: Any) -> Array:
    """Return a copy of the rows of `array` (C, …) at `indices` (n,), never a view."""
    if hasattr(xp, "take_rows"):
        return xp.take_rows(array, indices)
    if array_api_compat.is_torch_namespace(xp):
        return array[indices]  # its own take knows no unsigned integers
    return xp.take(array, indices, axis=0)


def take_columns(array: Array, columns: Array, xp: Any) -> Array:
    """Return array[i, columns[i, k]] for array (B, n) and columns (B, S): (B, S)."""
    flat = positions(array, xp)[:, None] * array.shape[1] + columns
    chosen = take(xp.reshape(array, (-1,)), xp.reshape(flat, (-1,)), xp)
    return xp.reshape(chosen, (-1, columns.shape[1]))


def arange_like(count: Any, like: Array, xp: Any) -> Array:
    """Return 0, 1, …, count - 1 on the device of `like`."""
    return xp.arange(count, dtype=index_dtype(xp), device=_device(like, xp))


def positions(array: Array, xp: Any) -> Array:
    """Return 0, 1, …, n - 1 for `array` (n, …), on its device."""
    return arange_like(length(array, xp), array, xp)


def fill(shape: tuple[int, ...], value: Any, like: Array, xp: Any) -> Array:
    """Return an array of `value` with the dtype and the device of `like`."""
    return xp.full(shape, value, dtype=like.dtype, device=_device(like, xp))


def _device(array: Array, xp: Any) -> Any:
    return xp.device_of(array) if hasattr(xp, "device_of") else array_api_compat.device(array)


def concat_rows(parts: Sequence[tuple[Array, ...]], xp: Any) -> tuple[Array, ...]:
    """Concatenate the first members of all parts, then the second ones, …."""
    if len(parts) == 1:
        return parts[0]
    return tuple(xp.concat(list(each), axis=0) for each in zip(*parts, strict=True))


def mask_rows(mask: Array, array: Array) -> Array:
    """Reshape a row mask (n,) so that it broadcasts over `array` (n, …)."""
    return mask[(slice(None),) + (None,) * (len(array.shape) - 1)]


def largest(values: Array, count: Any, xp: Any) -> Array:
    """Return the positions of the `count` largest integers, in order; ties to the lowest position.

    One pass finds the best of each group of values; only the groups with the `count` highest bests
    can hold one of the largest, and only they are looked at again.
    """
    groups, rest = divmod(values.shape[0], GROUP)
    known = isinstance(count, int)
    if known and 2 * count >= groups:
        return _sorted_largest(values, count, xp)
    whole = xp.reshape(values[: groups * GROUP], (groups, GROUP))
    few = count if known else xp.minimum(count, groups)
    # In ascending order, so that ties still go to the lowest position.
    held = xp.sort(_sorted_largest(xp.max(whole, axis=1), few, xp))
    places = held[:, None] * GROUP + arange_like(GROUP, held, xp)[None, :]
    places = xp.concat([xp.reshape(places, (-1,)), groups * GROUP + arange_like(rest, held, xp)])
    return take(places, _sorted_largest(take(values, places, xp), count, xp), xp)


GROUP = 128


def _sorted_largest(values: Array, count: Any, xp: Any) -> Array:
    """Do what `largest` does, with a partial sort where the library has one."""
    if hasattr(xp, "largest"):
        return xp.largest(values, count)
    if not (hasattr(xp, "topk") or hasattr(xp, "argpartition")) or not _has_int64(xp):
        return xp.argsort(values, descending=True, stable=True)[:count]
    # Partial sorts leave the order of ties open, so the position goes into the key.
    size = values.shape[0]
    position = positions(values, xp)
    keys = cast(values, xp.int64, xp) * size + (size - 1 - position)
    if hasattr(xp, "topk"):
        return xp.topk(keys, count).indices
    chosen = xp.argpartition(keys, size - count)[size - count :] if 0 < count < size else position
    return chosen[xp.argsort(keys[chosen], descending=True)][:count]


def _has_int64(xp: Any) -> bool:
    return bool(index_dtype(xp) == xp.int64)


def put_rows(table: Array, slots: Array, rows: Array, xp: Any) -> Array:
    """Return a copy of `table` (C, …) with `rows` (n, …) at `slots` (n,).

    Where a slot is named twice its rows must be equal: scatters have no defined order.
    """
    if hasattr(xp, "put_rows"):
        return xp.put_rows(table, slots, rows)
    if array_api_compat.is_jax_namespace(xp):
        return table.at[slots].set(rows)
    # PyTorch has no indexed writes for its wider unsigned integers.
    in_torch = array_api_compat.is_torch_namespace(xp) and "uint" not in dtype_name(table.dtype)
    in_numpy = array_api_compat.is_numpy_namespace(xp) or array_api_compat.is_cupy_namespace(xp)
    if in_torch or in_numpy:
        copy = xp.asarray(table, copy=True)
        copy[slots] = rows
        return copy
    # The standard has no scatter: find each slot's row by bisection instead.
    if math.prod(slots.shape) == 0:
        return xp.asarray(table, copy=True)
    order = xp.argsort(slots)
    ordered = slots[order]
    every = positions(table, xp)
    place = xp.searchsorted(ordered, every)
    place = xp.where(place < slots.shape[0], place, slots.shape[0] - 1)
    hit = ordered[place] == every
    return xp.where(mask_rows(hit, table), take(rows, order[place], xp), table)
