"""The state of a cache: its rows, and their ages."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from negcache_core.arrays._array import Array, dtype_kind, dtype_name
from negcache_core.arrays.backend import Backend
from negcache_core.arrays.validation import as_array, check_device, shape_of
from negcache_core.arrays.words import fields_in_words
from negcache_core.cache.specs import FieldSpec
from negcache_core.errors import CapacityError, DTypeError, KeysError, KindError, ShapeError

EMPTY = 2**31 - 1
"""Age of a slot whose row was never written: larger than any other, so empty slots fill first."""


OLDEST = EMPTY - 1
"""The age at which a row stops growing older, so that no run is long enough to empty a slot."""


class NegativeCache(NamedTuple):
    """The rows of a cache by field, one row per slot, and the age of each row.

    data: field name -> array (C, …), where C is the number of slots
    age:  int32 (C,), update steps since the row's embedding was written; EMPTY where there is none

    In the published code ages start at zero, so a row that was never written looks like a new one.
    Here such a row is never drawn, filtered on or counted.
    """

    data: dict[str, Any]  # arrays have their library's own methods, so users see Any
    age: Any

    def __repr__(self) -> str:
        """Return its size in words; the rows are too many to show."""
        try:
            slots = self.age.shape[0]
            rows = {key: FieldSpec(rows.shape[1:], rows.dtype) for key, rows in self.data.items()}
        except (AttributeError, IndexError, TypeError):  # it is none, and an error may print it
            return f"NegativeCache(data={self.data!r}, age={self.age!r})"
        written = written_slots([self.age])
        known = "" if written is None else f", {written:,} written"
        return f"NegativeCache({slots:,} slots{known}, {fields_in_words(rows, slots)})"


def is_written(age: Array) -> Array:
    """Return bool of the shape of `age`: True where a slot's row was written."""
    return age != EMPTY


def written_slots(ages: Iterable[Any]) -> int | None:
    """Return how many slots hold a row; None where values cannot be read, as in a trace."""
    try:
        hosts = [np.asarray(age.cpu() if hasattr(age, "detach") else age) for age in ages]
        return sum(int(np.sum(host != EMPTY)) for host in hosts)
    except Exception:  # noqa: BLE001 - each library refuses in its own way, and print must not
        return None


def data_of(cache: Any) -> Any:
    """Return what a cache's rows are in; None for what is no cache, such as an array."""
    # An array's `data` is something else, and NumPy raises if there is none.
    return None if hasattr(cache, "dtype") else getattr(cache, "data", None)


def check_cache(cache: Any, backend: Backend, what: str = "cache") -> NegativeCache:
    """Return `cache`, lists as arrays; raise unless fields and ages agree on the capacity."""
    if not isinstance(data_of(cache), Mapping) or not hasattr(cache, "age"):
        raise KindError(
            f"{what} is a {type(cache).__name__}: expected a NegativeCache(data, age), as "
            "CacheManager.init_cache() makes."
        )
    if not cache.data:
        raise KeysError(f"{what} has no fields: make it with CacheManager.init_cache().")
    data = {}
    for key, value in cache.data.items():
        if not isinstance(key, str):
            raise KeysError(f"{what} has key {key!r}: field names are strings.")
        data[key] = as_array(value, f"field {key!r} of {what}", backend)
        if dtype_kind(data[key].dtype) not in {"bool", "integer", "floating"}:
            raise DTypeError(
                f"field {key!r} of {what} has dtype {dtype_name(data[key].dtype)}: expected bool, "
                "an integer or a real floating dtype."
            )
    age = as_array(cache.age, f"age of {what}", backend)
    capacities = {key: (*shape_of(value, key), None)[0] for key, value in data.items()}
    shape = shape_of(age, "age")
    ranked = len(shape) == 1 and all(len(value.shape) for value in data.values())
    if not ranked or any(size != shape[0] for size in capacities.values()):
        raise ShapeError(
            f"{what} has age of shape {shape} and rows by field {capacities}: "
            "expected one age, and one row of every field, for each slot."
        )
    if shape == (0,):
        raise CapacityError(f"{what} has no slots: a cache needs at least one.")
    if dtype_kind(age.dtype) != "integer":
        raise DTypeError(f"age of {what} has dtype {dtype_name(age.dtype)}: expected int32.")
    for key, value in data.items():
        check_device(value, age, f"field {key!r} of {what}", backend)
    return NegativeCache(data, age)
