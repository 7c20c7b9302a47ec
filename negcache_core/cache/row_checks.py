"""Checks of what a caller passes as rows of a cache; see `negcache_core.arrays.validation`."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from negcache_core.arrays._array import Array, cast, dtype_kind, dtype_name, length
from negcache_core.arrays.backend import Backend
from negcache_core.arrays.validation import (
    array_of,
    as_array,
    check_device,
    check_keys,
    check_mapping,
    check_shape,
    shape_of,
)
from negcache_core.cache.plans import too_many_rows
from negcache_core.cache.quantized import scales_in
from negcache_core.cache.state import NegativeCache
from negcache_core.errors import CapacityError, DTypeError, KeysError, ShapeError


def check_rows(
    rows: Mapping[str, Any],
    cache: NegativeCache,
    what: str,
    backend: Backend,
    too_many: Callable[[int, int], CapacityError] | None = None,
    *,
    quantizes: bool = False,
) -> tuple[dict[str, Array], Any]:
    """Check rows by field against a cache's tables; return them as arrays, and their number.

    too_many:  makes the error for more rows than slots; None if any number is allowed
    quantizes: whether floating rows become codes, in a field that has scales
    """
    arrays: dict[str, Array] = {}
    counts: dict[str, int] = {}
    sized: Any = None
    alike = True
    for key, value in rows.items():
        table, name = cache.data[key], f"{what}[{key!r}]"
        expected = ("n", *shape_of(table, name)[1:])
        advice = "One row per item, each of the field's shape."
        if hasattr(value, "shape") and hasattr(value, "dtype"):
            size = check_shape(value, expected, name, advice).shape[0]
            if too_many is not None and isinstance(size, int) and size > table.shape[0]:
                raise too_many(size, table.shape[0])  # before anything is copied
            array = as_array(value, name, backend)
        else:
            array = array_of(value, expected, name, backend, advice)
        if array.dtype != table.dtype or array.dtype == backend.xp.int8:
            stored = _accepted(key, rows, cache, backend.xp, quantizes=quantizes)
            if not hasattr(value, "dtype") and _literal_fits(array, stored):
                array = backend.xp.astype(array, stored)
            check_castable(array.dtype, stored, name)
        arrays[key] = check_device(array, table, name, backend)
        if array.shape[0] is not None:
            alike = alike and (sized is None or array.shape[0] == sized.shape[0])
            counts[key], sized = array.shape[0], array
    if not alike:
        raise ShapeError(
            f"{what} has row counts {counts}: expected the same number of rows in all fields."
        )
    if not arrays:
        return {}, 0
    count = length(next(iter(arrays.values())) if sized is None else sized, backend.xp)
    capacity = cache.age.shape[0]
    if too_many is not None and isinstance(count, int) and count > capacity:
        raise too_many(count, capacity)
    return arrays, count


def _accepted(
    key: str, rows: Mapping[str, Any], cache: NegativeCache, xp: Any, *, quantizes: bool
) -> Any:
    """Return the dtype of a field's rows: its table's, but float32 if they become codes."""
    scale = scales_in(cache.data).get(key) if quantizes else None
    return cache.data[key].dtype if scale is None or scale in rows else xp.float32


def _literal_fits(array: Array, stored: Any) -> bool:
    """Return whether a plain list, which has no dtype of its own, may become rows of `stored`."""
    kinds = (dtype_kind(array.dtype), dtype_kind(stored))
    return array.shape[0] == 0 or kinds[0] == kinds[1] or kinds == ("integer", "floating")


def check_castable(given: Any, stored: Any, what: str) -> None:
    """Raise DTypeError unless rows of dtype `given` may be stored as `stored`."""
    kind = dtype_kind(stored)
    fits = dtype_kind(given) == kind and (kind != "integer" or _holds(stored, given))
    if not fits:
        coded = dtype_name(stored) == "int8" and dtype_kind(given) == "floating"
        advice = " For embeddings stored as int8, also declare their scales: '<field>_scale', "
        advice += "FieldSpec((), 'float32')."
        raise DTypeError(
            f"{what} has dtype {dtype_name(given)}, but its field stores {dtype_name(stored)}: "
            "expected the field's dtype, any floating one for a floating field, or a narrower "
            "integer for an integer field. Cast the rows, or declare the field with their dtype."
            + (advice if coded else "")
        )


def _holds(stored: Any, given: Any) -> bool:
    """Return whether the integer dtype `stored` holds every value of the integer dtype `given`."""
    (stored_unsigned, stored_bits), (given_unsigned, given_bits) = (
        (name.startswith("u"), int(name.removeprefix("u").removeprefix("int")))
        for name in (dtype_name(stored), dtype_name(given))
    )
    if stored_unsigned == given_unsigned:
        return stored_bits >= given_bits
    return given_unsigned and stored_bits > given_bits


class CheckedRows(dict[str, Array]):
    """Rows by field, already checked against the caches, as a handler checks its batch."""


class NewRows(NamedTuple):
    """Checked rows to insert: every field -> (n, …), and bool (n,) which of them, None for all."""

    rows: CheckedRows
    count: Any
    mask: Array | None = None


class Refresh(NamedTuple):
    """Checked rows to write in place: some fields -> (m, …), slots (m,), and bool (m,) or None."""

    rows: dict[str, Array]
    slots: Array
    mask: Array | None = None


def check_new_rows(
    new_items: Any, cache: NegativeCache, backend: Backend, mask: Any = None
) -> NewRows:
    """Check rows to insert: every field of the cache, with the same number of rows."""
    rows = check_mapping(new_items, "new_items")
    known: Any = cache.data
    if rows.keys() != known.keys():  # scales are implied
        implied = set(scales_in(known).values()).difference(rows)
        known = [key for key in known if key not in implied]
    check_keys(rows, known, "new_items", exact=True)
    arrays, count = check_rows(rows, cache, "new_items", backend, too_many_rows, quantizes=True)
    if mask is not None:
        mask = check_mask(mask, count, "new_items_mask", backend, like=cache.age)
    return NewRows(CheckedRows(arrays), count, mask)


def check_refresh(
    data: Any, indices: Any, mask: Any, cache: NegativeCache, backend: Backend
) -> Refresh | None:
    """Check a refresh: some fields, one slot index per row; None where all three are None."""
    if data is None and indices is None and mask is None:
        return None
    if data is None or indices is None:
        raise KeysError(
            "updated_item_data, updated_item_indices and updated_item_mask belong together: "
            "expected rows and their slots (the mask may be left out), or none of the three."
        )
    rows = check_mapping(data, "updated_item_data")
    check_keys(rows, cache.data, "updated_item_data", exact=False)
    arrays, count = check_rows(rows, cache, "updated_item_data", backend, quantizes=True)
    what, advice = "updated_item_indices", "One slot for each row of updated_item_data."
    known = arrays and isinstance(count, int)
    slots = array_of(indices, (count if known else "n",), what, backend, advice)
    check_device(slots, cache.age, what, backend)
    if dtype_kind(slots.dtype) != "integer" and slots.shape[0] != 0:
        raise DTypeError(
            f"updated_item_indices has dtype {dtype_name(slots.dtype)}: expected integers."
        )
    mask = check_mask(mask, slots.shape[0], "updated_item_mask", backend, like=cache.age)
    return Refresh(arrays, slots, mask)


def check_stand_in(
    features: Any, data_keys: tuple[str, ...], cache: NegativeCache, backend: Backend
) -> dict[str, Array] | None:
    """Check features that may replace drawn rows; return them in the cache's dtypes.

    None if there are no rows.
    """
    rows: Any = features
    if not isinstance(features, CheckedRows):
        check_mapping(features, "pos_features")
        missing = [key for key in data_keys if key not in features]
        if missing:
            raise KeysError(
                f"pos_features lack {missing}: expected everything that the item network takes, "
                f"{list(data_keys)}."
            )
        given = {key: features[key] for key in data_keys}
        rows, _ = check_rows(given, cache, "pos_features", backend)
    stand_in = {}
    for key in data_keys:
        if rows[key].shape[0] == 0:
            return None
        stand_in[key] = cast(rows[key], cache.data[key].dtype, backend.xp)
    return stand_in


def check_mask(
    mask: Any, count: Any, what: str, backend: Backend, *, like: Array | None = None
) -> Array | None:
    """Check a mask of `count` rows and return it as a bool array, or None."""
    if mask is None:
        return None
    expected = (count if isinstance(count, int) else "n",)
    array = array_of(mask, expected, what, backend, "One bool for each row.")
    if dtype_kind(array.dtype) != "bool":
        if array.shape[0] == 0:
            return backend.xp.astype(array, backend.xp.bool)
        raise DTypeError(f"{what} has dtype {dtype_name(array.dtype)}: expected bool.")
    return array if like is None else check_device(array, like, what, backend)
