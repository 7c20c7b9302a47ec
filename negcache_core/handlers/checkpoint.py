"""Save and load a handler's state; all of it is checked before any is put in place."""

import os
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, unquote

import numpy as np

from negcache_core.arrays._array import Array, cast
from negcache_core.arrays.validation import check_flag, check_keys
from negcache_core.cache.manager import CacheManager
from negcache_core.cache.named import SINGLE, Caches
from negcache_core.cache.restoring import (
    check_layout,
    held_as,
    nonfinite_rows,
    on_host,
    resize_cache,
    warn_of_nonfinite,
    without_nonfinite,
)
from negcache_core.cache.state import EMPTY, NegativeCache
from negcache_core.cache.window import window_over
from negcache_core.errors import OptionError
from negcache_core.files import as_path, read_arrays, write_arrays
from negcache_core.handlers.setup import Setup
from negcache_core.handlers.store import Store
from negcache_core.retrieval.top_k import check_groups

WINDOW = "window"
"""The name of the window's state among a file's arrays; those of caches have a "/"."""


def save(setup: Setup, store: Store, path: str | os.PathLike[str]) -> None:
    """Write rows, ages and the state of the draws to a file."""
    _check_whole(setup, "save")
    arrays = {}
    for name, cache in store.read().items():
        arrays[_joined(name, "age")] = setup.backend.to_host(cache.age)
        for key, rows in cache.data.items():
            arrays[_joined(name, "data", key)] = setup.backend.to_host(rows)
    window = store.read().window
    if window is not None:
        arrays[WINDOW] = setup.backend.to_host(window)
    states = [setup.backend.generator_state(each) for each in store.generators(setup.loss)]
    write_arrays(path, arrays, states)


def load(
    setup: Setup, store: Store, path: str | os.PathLike[str], *, resize: bool, draws: bool
) -> None:
    """Load what `save` wrote, with the state of the draws unless `draws` is False."""
    _check_whole(setup, "load")
    resize, draws = check_flag(resize, "resize"), check_flag(draws, "draws")
    arrays, states = read_arrays(path)
    window = arrays.pop(WINDOW, None)
    generators = store.generators(setup.loss) if draws else []
    kinds = [setup.backend.generator_state(each)[0] for each in generators]
    saved = [kind for kind, _ in states]
    if draws and saved != kinds:
        raise OptionError(
            f"{as_path(path)} has the state of generators {saved}: expected {kinds}. Pass "
            "draws=False to load the rows and continue with this handler's own draws."
        )
    _take_over(setup, store, _by_name(arrays), resize=resize, window=window)
    for generator, (_, state) in zip(generators, states, strict=False):
        setup.backend.set_generator_state(generator, state)


def restore(
    setup: Setup,
    store: Store,
    cache: NegativeCache | Mapping[str, NegativeCache],
    *,
    resize: bool,
) -> None:
    """Load the rows and ages of caches of any library."""
    _check_whole(setup, "restore")
    caches = cache if isinstance(cache, Mapping) else {SINGLE: cache}
    _take_over(setup, store, caches, resize=check_flag(resize, "resize"))


def resize(setup: Setup, store: Store, cache_size: Any) -> dict[str, CacheManager]:
    """Give caches another capacity, one for all or by name; return their managers."""
    _check_whole(setup, "resize")
    backend, caches = setup.backend, Caches(store.read())
    sizes = cache_size if isinstance(cache_size, Mapping) else dict.fromkeys(caches, cache_size)
    check_keys(sizes, caches, "cache_size", exact=False)
    managers = {name: setup.managers[name].with_size(size) for name, size in sizes.items()}
    slots = {name: cache.age.shape[0] for name, cache in caches.items()}
    slots.update((name, manager.cache_size) for name, manager in managers.items())
    top_k = getattr(setup.loss, "top_k", None)
    if top_k is not None:
        check_groups(top_k, sum(slots.values()))
    with backend.no_gradient():
        if any(backend.truth(cache.age[0] >= 0) is None for cache in caches.values()):
            raise OptionError(
                "resize changes shapes, so it must run eagerly: call it outside traced code, "
                "and trace the step again."
            )
        for name, size in slots.items():
            caches[name] = resize_cache(caches[name], size, backend)
        store.replace(caches)
    return managers


def evict_nonfinite(setup: Setup, store: Store) -> Array:
    """Empty the slots whose embedding is not finite; return how many there were."""
    backend, xp = setup.backend, setup.backend.xp
    caches = Caches(store.read())
    count: Any = 0
    with backend.no_gradient():
        for name, (data, age) in caches.items():
            bad = nonfinite_rows(NegativeCache(data, age), setup.embedding_key, backend)
            count = count + xp.sum(cast(bad, xp.index_dtype, xp))
            new_age = xp.where(bad, EMPTY, cast(age, xp.int32, xp))
            caches[name] = NegativeCache(data, backend.overwrite(age, new_age))
        store.write(caches)
    return count


def _take_over(
    setup: Setup,
    store: Store,
    given: Mapping[str, Any],
    *,
    resize: bool,
    window: Any = None,
) -> None:
    backend, own = setup.backend, store.read()
    check_keys(given, own, "cache", exact=True)
    fitting, count = {}, 0
    for name, cache in given.items():
        what = f"cache {name!r}"
        host = held_as(on_host(cache, backend, what), own[name], setup.embedding_key)
        check_layout(host, own[name], what, resize=resize)
        lowest = np.min(host.age)
        if lowest < 0:
            raise OptionError(
                f"{what} to load has an age of {lowest}: expected update steps, 0 or more, or "
                f"{EMPTY} for an empty slot."
            )
        resized = resize_cache(host, own[name].age.shape[0])
        fitting[name], more = without_nonfinite(resized, setup.embedding_key)
        count += more
    caches = Caches(own)
    for name, (data, age) in own.items():
        arrays = {
            key: backend.from_host(table, fitting[name].data[key]) for key, table in data.items()
        }
        caches[name] = NegativeCache(arrays, backend.from_host(age, fitting[name].age))
    if own.window is not None:
        if window is None:
            window = window_over(cache.age for cache in fitting.values())
        caches.window = backend.from_host(own.window, window)
    store.write(caches)
    warn_of_nonfinite(count)


def _check_whole(setup: Setup, what: str) -> None:
    if setup.placement.sharded:
        raise OptionError(
            f"{what} is for a whole cache, but this handler has a shard of one: use the "
            "framework's own checkpoints, as docs/scaling.md shows."
        )


def _joined(*parts: str) -> str:
    return "/".join(quote(part, safe="") for part in parts)


def _by_name(arrays: Mapping[str, Any]) -> dict[str, NegativeCache]:
    """Return the caches from arrays under the names that `_joined` made."""
    found: dict[str, NegativeCache] = {}
    for joined, array in arrays.items():
        name, *rest = map(unquote, joined.split("/"))
        cache = found.get(name, NegativeCache({}, array))
        found[name] = cache._replace(age=array) if rest == ["age"] else cache
        if rest != ["age"]:
            cache.data[rest[1]] = array
    return found
