"""Several named caches that count as one, in sorted order of their names."""

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

from negcache_core.arrays._array import Array, cast, mask_rows, take
from negcache_core.arrays.backend import Backend
from negcache_core.arrays.validation import check_device, shape_of
from negcache_core.cache.state import NegativeCache, check_cache, is_written
from negcache_core.errors import KeysError, ShapeError

SINGLE = "cache"  # the name a cache goes by where the caller gave it none


def named_caches(cache: Any, fields: tuple[str, ...], backend: Backend) -> dict[str, NegativeCache]:
    """Return caches by sorted name; check that each has `fields`, of one shape and dtype."""
    single = isinstance(cache, NegativeCache) or not isinstance(cache, Mapping)
    given = {SINGLE: cache} if single else dict(cache)
    if not given:
        raise KeysError("cache is an empty dict: expected at least one NegativeCache.")
    for name in given:
        if not isinstance(name, str):
            raise KeysError(f"cache has key {name!r}: the names of caches are strings.")
    caches = {name: check_cache(given[name], backend, f"cache {name!r}") for name in sorted(given)}
    first = next(iter(caches.values()))
    for name, each in caches.items():
        missing = [key for key in fields if key not in each.data]
        if missing:
            raise KeysError(
                f"cache {name!r} lacks {missing} of embedding_key and data_keys {list(fields)}: it "
                f"has {sorted(each.data)}. Add the field to its specs, or correct the keys."
            )
        for key in fields:
            own, other = (cache.data[key] for cache in (each, first))
            if shape_of(own, key)[1:] != shape_of(other, key)[1:] or own.dtype != other.dtype:
                raise ShapeError(
                    f"field {key!r} of cache {name!r} has row shape {tuple(own.shape)[1:]} and "
                    f"dtype {own.dtype}, elsewhere {tuple(other.shape)[1:]} and {other.dtype}: "
                    "caches that are treated as one need equal fields."
                )
        if each.age.shape[0] is None:
            raise ShapeError(f"cache {name!r} has an unknown capacity: set its static shape.")
        check_device(each.age, first.age, f"cache {name!r}", backend)
    return caches


def filled(caches: Mapping[str, NegativeCache], dtype: Any, xp: Any) -> Array:
    """Return the share of all slots that hold a row."""
    written = [xp.sum(cast(is_written(cache.age), dtype, xp)) for cache in caches.values()]
    total = sum(cache.age.shape[0] for cache in caches.values())
    return functools.reduce(operator.add, written) / total


def gather(
    caches: Mapping[str, NegativeCache],
    slots: Array,
    drawn: Array,
    embedding_key: str,
    data_keys: tuple[str, ...],
    backend: Backend,
    more: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Copy the drawn rows out of the caches: the row-wise fields of a Retrieval.

    slots, drawn: of the same shape; slots over all caches
    more:         name in the result -> field, for further fields
    """
    xp = backend.xp
    every, drawn = (xp.reshape(array, (-1,)) for array in (slots, drawn))
    start, places, mine = 0, {}, {}
    for name, cache in caches.items():
        capacity = cache.age.shape[0]
        mine[name] = (every >= start) & (every < start + capacity)
        places[name] = xp.where(mine[name], every - start, 0)
        start += capacity

    def rows_of(pick: Callable[[NegativeCache], Array]) -> Array:
        result = None
        for name, cache in caches.items():
            rows = take(pick(cache), places[name], xp)
            result = rows if result is None else xp.where(mask_rows(mine[name], rows), rows, result)
        return result

    def field(key: str) -> Array:
        return rows_of(lambda cache: cache.data[key])

    return {
        "features": {key: field(key) for key in data_keys},
        "stale_embeddings": field(embedding_key),
        "ages": rows_of(lambda cache: cache.age),
        **{name: field(key) for name, key in (more or {}).items()},
        "slots": places,
        "owned": {name: mask & drawn for name, mask in mine.items()},
    }
