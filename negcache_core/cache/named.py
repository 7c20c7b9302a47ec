"""Several named caches that count as one, in sorted order of their names."""

from collections.abc import Callable, Mapping
from typing import Any

from negcache_core.arrays._array import Array, cast, dtype_name, mask_rows
from negcache_core.arrays.backend import Backend
from negcache_core.arrays.validation import check_device, shape_of
from negcache_core.cache.quantized import dequantize, scales_in
from negcache_core.cache.specs import FieldSpec
from negcache_core.cache.state import NegativeCache, check_cache, is_written
from negcache_core.errors import KeysError, OptionError, ShapeError

SINGLE = "cache"  # the name of a cache that the caller did not name


class Caches(dict[str, NegativeCache]):
    """Caches by sorted name that are known to be valid: checked, or a handler's own.

    window: the state of negcache_core.cache.window; None where rows of every age compete
    """

    def __init__(self, caches: Mapping[str, NegativeCache], window: Any = None) -> None:
        super().__init__(caches)
        self.window = getattr(caches, "window", None) if window is None else window

    def first(self) -> NegativeCache:
        """Return the first cache; all have the same fields."""
        return next(iter(self.values()))


def named_caches(cache: Any, fields: tuple[str, ...], backend: Backend) -> Caches:
    """Return caches by sorted name; check that each has `fields`, of one shape and dtype."""
    if isinstance(cache, Caches):
        return cache
    single = isinstance(cache, NegativeCache) or not isinstance(cache, Mapping)
    given = {SINGLE: cache} if single else dict(cache)
    if not given:
        raise KeysError("cache is an empty dict: expected at least one NegativeCache.")
    for name in given:
        if not isinstance(name, str):
            raise KeysError(f"cache has key {name!r}: the names of caches are strings.")
    caches = Caches(
        {name: check_cache(given[name], backend, f"cache {name!r}") for name in sorted(given)}
    )
    first = caches.first()
    for name, each in caches.items():
        missing = [key for key in fields if key not in each.data]
        if missing:
            raise KeysError(
                f"cache {name!r} lacks {missing} of embedding_key and data_keys {list(fields)}: it "
                f"has {sorted(each.data)}. Add the field to its specs, or correct the keys."
            )
        if each.age.shape[0] is None:
            raise ShapeError(f"cache {name!r} has an unknown capacity: set its static shape.")
        check_device(each.age, first.age, f"cache {name!r}", backend)
    specs = {
        name: {
            key: FieldSpec(shape_of(rows[key], key)[1:], dtype_name(rows[key].dtype))
            for key in fields
        }
        for name, (rows, _) in caches.items()
    }
    check_equal_fields(specs, fields)
    return caches


def check_equal_fields(
    specs: Mapping[str, Mapping[str, FieldSpec]], fields: tuple[str, ...]
) -> None:
    """Raise ShapeError unless rows of all caches can be put together.

    specs: field -> spec, by cache
    """
    (first, own), *others = specs.items()
    for name, other in others:
        for key in fields:
            mine, theirs = own[key], other[key]
            if mine.shape != theirs.shape or dtype_name(mine.dtype) != dtype_name(theirs.dtype):
                raise ShapeError(
                    f"field {key!r} of cache {first!r} is {mine}, but that of cache {name!r} is "
                    f"{theirs}: caches that are used as one need equal fields."
                )


def check_window(caches: Caches, max_staleness: float | None) -> None:
    """Raise OptionError if a loss needs a window and nothing keeps one."""
    if max_staleness is not None and caches.window is None:
        raise OptionError(
            f"the loss has max_staleness={max_staleness}, whose window is state that only a "
            "handler keeps: call the loss through a CacheLossHandler or a NegativeCacheLoss, or "
            "leave max_staleness out."
        )


def filled(caches: Caches, dtype: Any, xp: Any) -> Any:
    """Return the share of all slots that hold a row."""
    written, slots = 0, 0
    for cache in caches.values():
        written = xp.sum(cast(is_written(cache.age), dtype, xp)) + written
        slots += cache.age.shape[0]
    return written / slots


def gather(
    caches: Caches, slots: Array, drawn: Array, fields: tuple[str, ...], xp: Any
) -> dict[str, Any]:
    """Copy rows out of the caches: "fields", "ages", and by cache name "slots" and "owned".

    slots:  (m, S) over all caches; drawn: bool (m, S), False where the row belongs to no cache
    fields: the embedding's comes first; if it holds codes, the copies are float32
    """
    tables = caches.first().data
    if tables[fields[0]].dtype == xp.int8:
        scale = scales_in(tables)[fields[0]]
        rows = gather(caches, slots, drawn, (scale, *fields[1:], fields[0]), xp)
        codes, scales = (rows["fields"].pop(key) for key in (fields[0], scale))
        rows["fields"] = {fields[0]: dequantize(codes, scales, xp=xp), **rows["fields"]}
        return rows
    flat, drawn = xp.reshape(slots, (-1,)), xp.reshape(drawn, (-1,))
    if len(caches) == 1:
        ((name, cache),) = caches.items()
        return {
            "fields": {key: xp.take_rows(cache.data[key], flat) for key in fields},
            "ages": xp.take_rows(cache.age, flat),
            "slots": {name: flat},
            "owned": {name: drawn},
        }
    start, places, mine = 0, {}, {}
    for name, cache in caches.items():
        capacity = cache.age.shape[0]
        mine[name] = (flat >= start) & (flat < start + capacity)
        places[name] = xp.where(mine[name], flat - start, 0)
        start += capacity

    def rows_of(pick: Callable[[NegativeCache], Array]) -> Any:
        result: Any = None
        for name, cache in caches.items():
            rows = xp.take_rows(pick(cache), places[name])
            result = rows if result is None else xp.where(mask_rows(mine[name], rows), rows, result)
        return result

    def field(key: str) -> Any:
        return rows_of(lambda cache: cache.data[key])

    return {
        "fields": {key: field(key) for key in fields},
        "ages": rows_of(lambda cache: cache.age),
        "slots": places,
        "owned": {name: mask & drawn for name, mask in mine.items()},
    }
