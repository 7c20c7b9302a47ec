"""Checks of one argument: its type, and an array's shape, dtype and device.

They read no values, so they need no device synchronisation and work while tracing. A size that is
unknown while tracing (None) fits any other.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from negcache_core.arrays._array import Array, dtype_kind, dtype_name
from negcache_core.arrays.backend import Backend
from negcache_core.errors import (
    DeviceError,
    DTypeError,
    KeysError,
    KindError,
    OptionError,
    ShapeError,
)


def in_order(keys: Iterable[Any]) -> list[Any]:
    """Return keys sorted for a message, whatever they are."""
    return sorted(keys, key=str)


def as_whole(value: Any) -> int | None:
    """Return any library's integer as an int; None for anything else, bools included.

    >>> as_whole(3), as_whole(True), as_whole(3.0)
    (3, None, None)
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        return None
    try:
        return int(value.__index__())
    except Exception:  # noqa: BLE001 - an array that is no scalar; each library refuses in its way
        return None


def check_flag(value: Any, what: str) -> bool:
    """Return a bool, also NumPy's or 0 and 1, as a bool; raise KindError for anything else."""
    if isinstance(value, bool):
        return value
    number = value if dtype_name(type(value)) in {"bool", "bool_"} else as_whole(value)
    if number is None or number not in (0, 1):
        raise KindError(f"{what} is {value!r}: expected True or False.")
    return bool(number)


def check_number(value: Any, what: str) -> None:
    """Raise KindError or OptionError unless `value` is a finite real number of Python's."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise KindError(f"{what} is {value!r}: expected a number.")
    if abs(value) > LARGEST or not math.isfinite(value):
        raise OptionError(f"{what} is {value}: expected a finite number.")


LARGEST = 1e300
"""No option is larger; a float holds products with it that matter."""


def check_function(value: Any, what: str, advice: str = "a function") -> None:
    """Raise KindError unless `value` can be called."""
    if not callable(value):
        raise KindError(f"{what} is {value!r}: expected {advice}.")


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
    try:
        given = tuple(array.shape)
    except ValueError:
        given = shape_of(array, what)  # raises our own error
    fits = len(given) == len(expected)
    for size, want in zip(given, expected, strict=False):
        if not (isinstance(want, str) or want is None or size is None or size == want):
            fits = False
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


def as_array(value: Any, what: str, backend: Backend) -> Array:
    """Return `value` as an array of the backend's library; its own are returned unchanged."""
    if backend.owns(value):
        return value
    refusal = KindError(
        f"{what} is a {type(value).__name__}, which {backend.name} cannot turn into an array: "
        "expected an array, or nested lists of numbers."
    )
    try:
        array = backend.to_array(value)
    except Exception as error:  # each library raises something else
        raise refusal from error
    if not backend.owns(array):
        raise refusal
    return array


def array_of(
    value: Any, expected: tuple[Any, ...], what: str, backend: Backend, advice: str = ""
) -> Array:
    """Return `value` as an array of the expected shape; a wrong one is refused before any copy."""
    known = hasattr(value, "shape") and hasattr(value, "dtype")
    if known:
        check_shape(value, expected, what, advice)
    array = as_array(value, what, backend)
    return array if known else check_shape(array, expected, what, advice)


def embeddings_of(
    value: Any,
    expected: tuple[Any, ...],
    what: str,
    backend: Backend,
    *,
    like: Array | None = None,
    advice: str = "",
) -> Array:
    """Return `value` as floating embeddings of the expected shape, on the device of `like`."""
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        wanted = ", ".join(size if isinstance(size, str) else "D" for size in expected)
        raise KindError(f"{what} is a {type(value).__name__}: expected an array ({wanted}).")
    array = check_floating(array_of(value, expected, what, backend, advice), what)
    return array if like is None else check_device(array, like, what, backend)


def check_device(array: Array, like: Any, what: str, backend: Backend) -> Array:
    """Raise DeviceError unless `array` is where the cache's `like` is."""
    if backend.has_devices and array.device != like.device:
        raise DeviceError(
            f"{what} is on {array.device} and the cache on {like.device}: move one of them."
        )
    return array


def names_of(names: Any, what: str, example: str, purpose: str) -> tuple[str, ...]:
    """Return field names, at least one, as a tuple."""
    refusal = f"{what} is {names!r}: expected several field names, such as ({example!r},)."
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise KindError(refusal)
    try:
        found = tuple(names)
    except Exception as error:
        raise KindError(refusal) from error
    if not found:
        raise KeysError(f"{what} is empty: name the fields that {purpose}.")
    for name in found:
        if not isinstance(name, str):
            raise KindError(f"{what} has {name!r}: expected field names.")
    return found


def check_field_names(embedding_key: Any, data_keys: Any) -> tuple[str, tuple[str, ...]]:
    """Return the names of the embedding field and of the item network's fields, checked."""
    if not isinstance(embedding_key, str):
        raise KindError(f"embedding_key is {embedding_key!r}: expected a field name.")
    return embedding_key, names_of(data_keys, "data_keys", "token_ids", "the item network takes")


def check_mapping(value: Any, what: str) -> Mapping[str, Any]:
    """Raise KindError unless `value` is a mapping of field name -> array."""
    if not isinstance(value, Mapping):
        raise KindError(
            f"{what} is a {type(value).__name__}: expected a dict of field name -> array."
        )
    return value


def check_keys(given: Iterable[Any], known: Iterable[str], what: str, *, exact: bool) -> None:
    """Raise KeysError unless `given` is all of `known`, or (exact=False) some of it."""
    given_keys, known_keys = list(given), list(known)
    if set(given_keys) == set(known_keys) or (not exact and set(given_keys) <= set(known_keys)):
        return
    missing = in_order(key for key in known_keys if key not in given_keys) if exact else []
    unknown = in_order(key for key in given_keys if key not in known_keys)
    if missing or unknown:
        kind = "exactly" if exact else "some of"
        raise KeysError(
            f"{what} has keys {in_order(given_keys)}: expected {kind} {in_order(known_keys)}"
            + (f"; missing: {missing}" if missing else "")
            + (f"; unknown: {unknown}" if unknown else "")
            + "."
        )
