"""Whether a cache to load fits: its layout, its capacity, its finite rows."""

import warnings
from typing import Any

import numpy as np

from negcache_core.arrays._array import cast, dtype_kind, dtype_name, fill
from negcache_core.arrays.backend import NUMPY, Backend
from negcache_core.arrays.numerics import finite_rows
from negcache_core.arrays.validation import check_keys, check_mapping
from negcache_core.cache.quantized import LARGEST_SCALE, dequantize, quantize, scales_in
from negcache_core.cache.state import EMPTY, NegativeCache, check_cache, data_of, is_written
from negcache_core.errors import CapacityError, DTypeError, KindError, NonFiniteWarning, ShapeError


def check_layout(given: Any, own: Any, what: str, *, resize: bool = False) -> None:
    """Raise unless two caches have the same fields, row shapes, dtypes and capacity.

    given, own: NegativeCaches of arrays, or of anything with .shape and .dtype
    resize:     whether capacities may differ
    """
    data = check_mapping(data_of(given), f"the data of {what}")
    check_keys(data, own.data, f"the data of {what}", exact=True)
    for array in (given.age, *data.values()):
        if not hasattr(array, "shape") or not hasattr(array, "dtype"):
            raise KindError(f"{what} to load has a {type(array).__name__}: expected arrays.")
    slots, capacity = (*given.age.shape, None)[0], own.age.shape[0]
    if slots != capacity and not resize:
        raise CapacityError(
            f"{what} to load has {slots} slots: expected {capacity}. Make the handler with "
            f"cache_size={slots}, or pass resize=True to handler.load or handler.restore, which "
            "keeps the youngest rows."
        )
    named = {"age": (given.age, own.age)} | {
        f"field {key!r}": (given.data[key], table) for key, table in own.data.items()
    }
    for part, (array, table) in named.items():
        rows, wanted = tuple(array.shape), tuple(table.shape)
        if len(rows) == 0 or rows[0] != slots or rows[1:] != wanted[1:]:
            raise ShapeError(
                f"{what} to load has {part} of shape {rows}: expected "
                f"{(slots, *wanted[1:])}. It was saved with other specs: make the handler with "
                "those, or start with an empty cache."
            )
        if dtype_name(array.dtype) != dtype_name(table.dtype):
            raise DTypeError(
                f"{what} to load has {part} of dtype {dtype_name(array.dtype)}: expected "
                f"{dtype_name(table.dtype)}. Make the handler with that dtype, or cast the rows "
                "yourself and pass them to handler.restore."
            )


def resize_cache(cache: NegativeCache, capacity: int, backend: Backend = NUMPY) -> NegativeCache:
    """Return a cache with `capacity` slots; see `BaseHandler.resize`.

    >>> cache = NegativeCache({"x": np.asarray([5, 6, 7])}, np.asarray([1, 0, 2], dtype=np.int32))
    >>> resize_cache(cache, 2).data["x"], resize_cache(cache, 4).age
    (array([5, 6]), array([         1,          0,          2, 2147483647], dtype=int32))
    """
    xp, spare = backend.xp, capacity - cache.age.shape[0]
    if spare == 0:
        return cache
    if spare < 0:
        by_age = xp.argsort(-cast(cache.age, xp.index_dtype, xp), stable=True)  # as they leave
        kept = xp.sort(by_age[-spare:])
        data = {key: xp.take_rows(rows, kept) for key, rows in cache.data.items()}
        return NegativeCache(data, xp.take_rows(cache.age, kept))
    data = {
        key: xp.concat([rows, fill((spare, *rows.shape[1:]), 0, rows, xp)])
        for key, rows in cache.data.items()
    }
    return NegativeCache(data, xp.concat([cache.age, fill((spare,), EMPTY, cache.age, xp)]))


def nonfinite_rows(cache: NegativeCache, embedding_key: str, backend: Backend) -> Any:
    """Return bool (C,): which slots hold a row with an embedding that is not finite."""
    xp = backend.xp
    scale = scales_in(cache.data).get(embedding_key)
    if scale is None:
        finite = finite_rows(cache.data[embedding_key], xp=xp)
    else:
        finite = xp.abs(cache.data[scale]) <= LARGEST_SCALE
    return is_written(cast(cache.age, xp.int32, xp)) & ~finite


def warn_of_nonfinite(count: int) -> None:
    """Warn if rows of a cache to load were left out."""
    if count:
        warnings.warn(
            f"{count} rows of the cache to load have an embedding that is not finite: their "
            "slots were emptied, because each would have made every loss NaN. Find out what "
            "wrote them.",
            NonFiniteWarning,
            stacklevel=4,
        )


def on_host(cache: Any, backend: Backend, what: str) -> NegativeCache:
    """Return a cache of any library, checked, as NumPy arrays."""

    def moved(value: Any, part: str) -> Any:
        if not backend.owns(value):
            return value
        try:
            return backend.to_host(value)
        except Exception as error:  # each library raises something else, for example on "meta"
            raise KindError(f"{part} of {what} has no values to copy: {error}") from error

    rows = check_mapping(data_of(cache), f"the data of {what}")
    held = {key: moved(value, f"field {key!r}") for key, value in rows.items()}
    age = moved(getattr(cache, "age", None), "age")
    data, age = check_cache(NegativeCache(held, age), NUMPY, what)
    if age.dtype.kind in "iu" and (age <= EMPTY).all():  # those from a plain list are int64
        age = age.astype(np.int32)
    return NegativeCache(data, age)


def held_as(given: NegativeCache, own: NegativeCache, key: str) -> NegativeCache:
    """Return a cache on the host with embeddings as codes, or in float32, if `own` holds such."""
    data = dict(given.data)
    had, has = scales_in(data).get(key), scales_in(own.data).get(key)
    if key not in data or (had is None) == (has is None):
        return given
    if has is not None and dtype_kind(data[key].dtype) == "floating":
        with NUMPY.no_gradient():  # float64 may be beyond float32
            data[key], data[has] = quantize(data[key], xp=NUMPY.xp)
    elif had is not None and dtype_kind(own.data[key].dtype) == "floating":
        data[key] = dequantize(data[key], data.pop(had), xp=NUMPY.xp)
    return given._replace(data=data)


def without_nonfinite(cache: NegativeCache, key: str) -> tuple[NegativeCache, int]:
    """Empty the slots of rows that are not finite; return how many there were."""
    bad = nonfinite_rows(cache, key, NUMPY)
    return cache._replace(age=np.where(bad, np.int32(EMPTY), cache.age)), int(bad.sum())
