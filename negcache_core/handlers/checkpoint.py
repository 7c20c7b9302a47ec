"""The state of a handler on a disk and back; checked whole before any of it is put in place."""

import os
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, unquote

from negcache_core.arrays._array import Array, cast, index_dtype
from negcache_core.arrays.validation import check_flag, check_keys
from negcache_core.cache.named import SINGLE
from negcache_core.cache.restoring import (
    check_layout,
    nonfinite_rows,
    on_host,
    resize_cache,
    warn_of_nonfinite,
    without_nonfinite,
)
from negcache_core.cache.state import EMPTY, NegativeCache
from negcache_core.errors import OptionError
from negcache_core.files import as_path, read_arrays, write_arrays
from negcache_core.handlers.step import BaseHandler
from negcache_core.sharding.placement import ShardedLoss


class Checkpointed(BaseHandler):
    """What a handler does to be saved, and to go on exactly where it was.

    >>> import pathlib, tempfile
    >>> import numpy as np
    >>> from negcache_core import CacheClassificationLoss, CacheLossHandler, CacheManager, FieldSpec
    >>> def make(cache_size):
    ...     specs = {"x": FieldSpec((1,), "float32"), "embedding": FieldSpec((1,), "float32")}
    ...     return CacheLossHandler(
    ...         CacheManager(specs, cache_size), CacheClassificationLoss("embedding", ("x",)),
    ...         embedding_key="embedding", data_keys=("x",))
    >>> handler = make(4)
    >>> x = np.asarray([[1.0], [2.0], [3.0]], dtype=np.float32)
    >>> _ = handler.prefill(lambda features: features["x"], {"x": x}, batch_size=2)
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "cache.safetensors"
    >>> handler.save(path)
    >>> resumed = make(2)
    >>> resumed.load(path, resize=True)
    >>> resumed.cache.data["x"][:, 0]
    array([2., 3.], dtype=float32)
    """

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write rows, ages and the state of the draws to a safetensors file.

        Atomic: whenever the process dies, `path` is the old file or the new one, whole. Trained
        parameters, such as a scale, are the model's to save. Every library reads the rows that
        another wrote. Where replicas hold equal caches, one of them is to save.

        JAX: `handler.save(state, path)`.

        Raises KindError if `path` is no path, OSError where it cannot be written, and OptionError
        for a cache in shards, which its framework's own checkpoints save: see docs/scaling.md.
        """
        self._whole_cache("save")
        arrays = {}
        for name, cache in self._caches().items():
            arrays[_joined(name, "age")] = self.backend.to_host(cache.age)
            for key, rows in cache.data.items():
                arrays[_joined(name, "data", key)] = self.backend.to_host(rows)
        states = [self.backend.generator_state(each) for each in self._generators()]
        write_arrays(path, arrays, states)

    def load(
        self, path: str | os.PathLike[str], *, resize: bool = False, draws: bool = True
    ) -> None:
        """Take over what `save` wrote; training goes on as if it had never stopped.

        resize: see `restore`
        draws:  False: take the rows and ages only, as of a file that another library wrote

        JAX: `state = handler.load(state, path)`.

        Raises CheckpointError for a truncated or corrupted file, OptionError if its draws are not
        those of this handler, and what `restore` raises. Any exception leaves all as it was.
        """
        self._whole_cache("load")
        resize, draws = check_flag(resize, "resize"), check_flag(draws, "draws")
        arrays, states = read_arrays(path)
        generators = self._generators() if draws else []
        kinds = [self.backend.generator_state(each)[0] for each in generators]
        saved = [kind for kind, _ in states]
        if draws and saved != kinds:
            raise OptionError(
                f"{as_path(path)} has the state of generators {saved}: expected {kinds}. Pass "
                "draws=False to load the rows and go on with this handler's own draws."
            )
        self._restore(_by_name(arrays), resize=resize)
        for generator, (_, state) in zip(generators, states, strict=False):
            self.backend.set_generator_state(generator, state)

    def restore(
        self, cache: NegativeCache | Mapping[str, NegativeCache], *, resize: bool = False
    ) -> None:
        """Take over the rows and ages of `cache`: of another handler, run or library.

        cache:  a NegativeCache, or those of a MultiCacheLossHandler by name; it is copied
        resize: whether it may have another capacity: of more rows than fit the youngest stay, of
                equal ages those that would have been overwritten last; slots to spare are empty

        Rows whose embedding is not finite do not come along: a NonFiniteWarning counts them.

        JAX: `state = handler.restore(state, cache)`.

        Raises KeysError, ShapeError, DTypeError or CapacityError unless the fields, their rows and
        the capacity are those of this handler, OptionError for an age below 0 or a cache in
        shards. Any exception leaves all as it was.
        """
        self._whole_cache("restore")
        caches = cache if isinstance(cache, Mapping) else {SINGLE: cache}
        self._restore(caches, resize=check_flag(resize, "resize"))

    def evict_nonfinite(self) -> Array:
        """Empty the slots whose embedding is not finite; return how many there were.

        No step writes such a row, and `load` and `restore` leave them out. Call this where a
        framework's own checkpoint brought in rows from elsewhere: one would make every loss NaN.
        The slots are the next to be written. Nothing else changes, and no value is read.

        JAX: `state = handler.evict_nonfinite(state)`, with no count.
        """
        backend, xp, count = self.backend, self.backend.xp, 0
        caches = dict(self._caches())
        with backend.no_gradient():
            for name, (data, age) in caches.items():
                bad = nonfinite_rows(NegativeCache(data, age), self.embedding_key, backend)
                count = count + xp.sum(cast(bad, index_dtype(xp), xp))
                new_age = xp.where(bad, EMPTY, cast(age, xp.int32, xp))
                caches[name] = NegativeCache(data, backend.overwrite(age, new_age))
            self._keep(caches)
        return count

    def _restore(self, given: Mapping[str, Any], *, resize: bool) -> None:
        backend, own = self.backend, self._caches()
        check_keys(given, own, "cache", exact=True)
        fitting, count = {}, 0
        for name, cache in given.items():
            what = f"cache {name!r}"
            host = on_host(cache, backend, what)
            check_layout(host, own[name], what, resize=resize)
            if (host.age < 0).any():
                raise OptionError(
                    f"{what} to load has an age of {host.age.min()}: expected update steps, 0 and "
                    f"more, and {EMPTY} for empty slots."
                )
            resized = resize_cache(host, own[name].age.shape[0])
            fitting[name], more = without_nonfinite(resized, self.embedding_key)
            count += more
        caches = {}
        for name, (data, age) in own.items():
            arrays = {
                key: backend.from_host(table, fitting[name].data[key])
                for key, table in data.items()
            }
            caches[name] = NegativeCache(arrays, backend.from_host(age, fitting[name].age))
        self._keep(caches)
        warn_of_nonfinite(count)

    def _generators(self) -> list[Any]:
        """Return what draws: the loss's generator, and its retrieval function's if it has one."""
        holders = (self.cache_loss, getattr(self.cache_loss, "retrieval_fn", None))
        found = (getattr(holder, "generator", None) for holder in holders)
        return [generator for generator in found if generator is not None]

    def _whole_cache(self, what: str) -> None:
        if isinstance(self.cache_loss, ShardedLoss):
            raise OptionError(
                f"{what} is for a whole cache, and this handler has a shard of one: use the "
                "framework's own checkpoints, as docs/scaling.md shows."
            )


def _joined(*parts: str) -> str:
    return "/".join(quote(part, safe="") for part in parts)


def _by_name(arrays: Mapping[str, Any]) -> dict[str, NegativeCache]:
    """Return the caches whose arrays go by names that `_joined` made."""
    found: dict[str, NegativeCache] = {}
    for joined, array in arrays.items():
        name, *rest = map(unquote, joined.split("/"))
        cache = found.get(name, NegativeCache({}, None))
        found[name] = cache._replace(age=array) if rest == ["age"] else cache
        if rest != ["age"]:
            cache.data[rest[1]] = array
    return found
