"""Checks of what a caller hands in, on keys, shapes and dtypes alone: no value is read.

So they cost no device synchronisation and work while a function is being traced. A size that is
unknown while tracing (None) fits any other.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from negcache_core._array import Array, cast, dtype_kind, dtype_name, length
from negcache_core.backend import Backend
from negcache_core.errors import DeviceError, DTypeError, KeysError, KindError, ShapeError
from negcache_core.state import NegativeCache


def shape_of(array: Array, what: str) -> tuple[Any, ...]:
    """Return an array's shape as a tuple, None where a size is unknown."""
    try:
        return tuple(array.shape)
    except ValueError as error:  # TensorFlow: unknown rank
        raise ShapeError(
            f"{what} has unknown rank: set its static shape before this call."
        ) from error


def check_shape(array: Array, expected: tuple[Any, ...], what: str, advice: str = "") -> Array:
    """Raise ShapeError unless `array` has the expected shape; a str in it names a free size."""
    given = shape_of(array, what)
    fits = len(given) == len(expected) and all(
        isinstance(want, str) or want is None or size is None or size == want
        for size, want in zip(given, expected, strict=False)
    )
    if not fits:
        wanted = ", ".join(str(size) for size in expected) + ("," if len(expected) == 1 else "")
        raise ShapeError(f"{what} has shape {given}: expected ({wanted}). {advice}".rstrip())
    return array


def check_floating(array: Array, what: str) -> Array:
    """Raise DTypeError unless `array` is of a real floating dtype."""
    if dtype_kind(array.dtype) != "floating":
        raise DTypeError(
            f"{what} has dtype {dtype_name(array.dtype)}: expected float16, bfloat16, float32 or "
            "float64. Pass the network's output, not its input."
        )
    return array


def check_field_names(embedding_key: Any, data_keys: Any) -> tuple[str, tuple[str, ...]]:
    """Return the names of the embedding field and of the item network's fields, checked."""
    if not isinstance(embedding_key, str):
        raise KindError(f"embedding_key is {embedding_key!r}: expected a field name.")
    if isinstance(data_keys, str) or not isinstance(data_keys, Iterable):
        raise KindError(
            f"data_keys is {data_keys!r}: expected several field names, such as ('token_ids',)."
        )
    keys = tuple(data_keys)
    if not keys:
        raise KeysError("data_keys is empty: name the fields that the item network takes.")
    for key in keys:
        if not isinstance(key, str):
            raise KindError(f"data_keys has {key!r}: expected field names.")
    return embedding_key, keys


def check_mapping(value: Any, what: str) -> Mapping[str, Any]:
    """Raise KindError unless `value` is a mapping of field name -> array."""
    if not isinstance(value, Mapping):
        raise KindError(
            f"{what} is a {type(value).__name__}: expected a dict of field name -> array."
        )
    return value


def check_keys(given: Iterable[str], known: Iterable[str], what: str, *, exact: bool) -> None:
    """Raise KeysError unless `given` is all of `known`, or (exact=False) some of it."""
    given_set, known_set = set(given), set(known)
    missing = sorted(known_set - given_set) if exact else []
    unknown = sorted(given_set - known_set, key=str)
    if missing or unknown:
        kind = "exactly" if exact else "some of"
        raise KeysError(
            f"{what} has keys {sorted(given_set, key=str)}: expected {kind} {sorted(known_set)}"
            + (f"; missing: {missing}" if missing else "")
            + (f"; unknown: {unknown}" if unknown else "")
            + "."
        )


def check_rows(
    rows: Mapping[str, Any], cache: NegativeCache, what: str, backend: Backend
) -> tuple[dict[str, Array], Any]:
    """Check rows by field against a cache's tables; return them as arrays, and their number."""
    arrays: dict[str, Array] = {}
    for key, value in rows.items():
        table, name = cache.data[key], f"{what}[{key!r}]"
        array = backend.to_array(value)
        if not hasattr(value, "dtype") and _literal_fits(array, table.dtype):
            array = backend.xp.astype(array, table.dtype)
        row_shape = shape_of(table, name)[1:]
        check_shape(array, ("n", *row_shape), name, "One row per item, each of the field's shape.")
        check_castable(array.dtype, table.dtype, name)
        if backend.device(array) != backend.device(table):
            raise DeviceError(
                f"{name} is on {backend.device(array)} and the cache on {backend.device(table)}: "
                "move one of them."
            )
        arrays[key] = array
    counts = {key: array.shape[0] for key, array in arrays.items() if array.shape[0] is not None}
    if any(count != next(iter(counts.values())) for count in counts.values()):
        raise ShapeError(
            f"{what} has row counts {counts}: expected one number of rows in all fields."
        )
    if not arrays:
        return {}, 0
    sized = next((array for key, array in arrays.items() if key in counts), None)
    return arrays, length(next(iter(arrays.values())) if sized is None else sized, backend.xp)


def _literal_fits(array: Array, stored: Any) -> bool:
    """Return whether a plain list, which has no dtype of its own, may become rows of `stored`."""
    kinds = (dtype_kind(array.dtype), dtype_kind(stored))
    return array.shape[0] == 0 or kinds[0] == kinds[1] or kinds == ("integer", "floating")


def check_castable(given: Any, stored: Any, what: str) -> None:
    """Raise DTypeError unless rows of dtype `given` may be stored as `stored`."""
    kind = dtype_kind(stored)
    fits = dtype_kind(given) == kind and (kind != "integer" or _holds(stored, given))
    if not fits:
        raise DTypeError(
            f"{what} has dtype {dtype_name(given)} and its field stores {dtype_name(stored)}: "
            "expected the field's dtype, any floating one for a floating field, or a narrower "
            "integer for an integer field. Cast the rows, or declare the field with their dtype."
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


def check_new_rows(
    new_items: Any, cache: NegativeCache, backend: Backend
) -> tuple[dict[str, Array], Any]:
    """Check rows that are to be inserted: every field of the cache, one number of rows."""
    rows = check_mapping(new_items, "new_items")
    check_keys(rows, cache.data, "new_items", exact=True)
    return check_rows(rows, cache, "new_items", backend)


def check_refresh(
    data: Any, indices: Any, mask: Any, cache: NegativeCache, backend: Backend
) -> tuple[dict[str, Array], Array, Array | None]:
    """Check a refresh: some fields, one slot index per row; return rows, indices and mask."""
    if data is None or indices is None:
        raise KeysError(
            "updated_item_data, updated_item_indices and updated_item_mask belong together: "
            "expected rows and their slots (the mask may be left out), or none of the three."
        )
    rows = check_mapping(data, "updated_item_data")
    check_keys(rows, cache.data, "updated_item_data", exact=False)
    slots = backend.to_array(indices)
    count = shape_of(slots, "updated_item_indices")[:1] or (None,)
    arrays, rows_count = check_rows(rows, cache, "updated_item_data", backend)
    if arrays and isinstance(rows_count, int):
        count = (rows_count,)
    check_shape(slots, count, "updated_item_indices", "One slot for each row of updated_item_data.")
    if dtype_kind(slots.dtype) != "integer" and slots.shape[0] != 0:
        raise DTypeError(
            f"updated_item_indices has dtype {dtype_name(slots.dtype)}: expected integers."
        )
    return arrays, slots, check_mask(mask, slots.shape[0], "updated_item_mask", backend)


def check_stand_in(
    features: Any, data_keys: tuple[str, ...], caches: Mapping[str, NegativeCache], backend: Backend
) -> dict[str, Array]:
    """Check features that may stand in for drawn rows; return them in the caches' dtypes."""
    check_mapping(features, "pos_features")
    missing = [key for key in data_keys if key not in features]
    if missing:
        raise KeysError(
            f"pos_features lack {missing}: expected all that the item network takes, "
            f"{list(data_keys)}."
        )
    cache = next(iter(caches.values()))
    rows, _ = check_rows({key: features[key] for key in data_keys}, cache, "pos_features", backend)
    return {key: cast(value, cache.data[key].dtype, backend.xp) for key, value in rows.items()}


def check_mask(mask: Any, count: Any, what: str, backend: Backend) -> Array | None:
    """Check a mask of `count` rows and return it as a bool array, or None."""
    if mask is None:
        return None
    array = backend.to_array(mask)
    check_shape(array, (count if isinstance(count, int) else "n",), what, "One bool for each row.")
    if dtype_kind(array.dtype) != "bool":
        if array.shape[0] == 0:
            return backend.xp.astype(array, backend.xp.bool)
        raise DTypeError(f"{what} has dtype {dtype_name(array.dtype)}: expected bool.")
    return array
