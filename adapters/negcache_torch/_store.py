"""Where a cache's state lives in PyTorch: in modules that hide it from wrappers."""

from typing import Any

import torch
from torch import Tensor, nn

from negcache_core import EMPTY, KeysError, NegativeCache
from negcache_core.adapter import Caches, Setup, Store
from negcache_core.cache.restoring import check_layout, nonfinite_rows, warn_of_nonfinite
from negcache_core.cache.window import new_window, window_over

from ._backend import TORCH
from ._state import OwnState


class CacheTable(OwnState):
    """One cache's rows and ages."""

    def __init__(self, cache: NegativeCache) -> None:
        names = {key: "field_" + module_name(key) for key in cache.data}
        super().__init__(
            {names[key]: table for key, table in cache.data.items()} | {"age": cache.age}
        )
        self._names = names

    def put(self, cache: NegativeCache) -> None:
        """Hold other rows and ages, perhaps of another number of slots."""
        self.age = cache.age
        for key, table in cache.data.items():
            setattr(self, self._names[key], table)

    @property
    def cache(self) -> NegativeCache:
        """The live rows and ages: writing to these tensors writes to the state."""
        return self.view(self.held._buffers)  # noqa: SLF001 - its own

    def view(self, tensors: dict[str, Any]) -> NegativeCache:
        """Return tensors, by their names in this module, as a cache."""
        data = {key: tensors[name] for key, name in self._names.items()}
        return NegativeCache(data, tensors["age"])

    def reset_parameters(self) -> None:
        """Empty every slot."""
        for table in self.cache.data.values():
            table.zero_()
        self.cache.age.fill_(EMPTY)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        *others: Any,
    ) -> None:
        before, names = len(missing_keys), [name for name, _ in self.named_buffers()]
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, *others
        )
        if len(missing_keys) == before + len(names):
            missing_keys[before] = MissingCache(missing_keys[before])


class WindowTable(OwnState):
    """The state of a window of ages."""

    def __init__(self, window: Tensor) -> None:
        super().__init__({"state": window})

    @property
    def window(self) -> Any:
        """The live state: writing to this tensor writes to it."""
        return self.held._buffers["state"]  # noqa: SLF001 - its own

    def reset_parameters(self) -> None:
        """Reset it to its initial state."""
        self.window.copy_(new_window(TORCH.xp))


class BufferStore(Store):
    """The caches of a handler as the state of its module `tables`; written in place."""

    def __init__(self, caches: Caches) -> None:
        self.tables = {name: CacheTable(cache) for name, cache in caches.items()}
        self.window = None if caches.window is None else WindowTable(caches.window)

    @classmethod
    def of(cls, setup: Setup) -> "BufferStore":
        """Return the store of a new handler."""
        return cls(setup.init_caches())

    def attach(self, handler: Any) -> None:
        """Make the tables part of the handler's module, and so of its state_dict."""
        handler.tables = nn.ModuleDict(
            {table_name(name): table for name, table in self.tables.items()}
        )
        if self.window is not None:
            handler.tables[WINDOW] = self.window
        handler.register_load_state_dict_pre_hook(check_loaded)

    def read(self) -> Caches:
        """Return the live tensors."""
        caches = {name: table.cache for name, table in self.tables.items()}
        return Caches(caches, None if self.window is None else self.window.window)

    def write(self, caches: Caches) -> None:
        """Do nothing: tensors are written in place."""

    def replace(self, caches: Caches) -> None:
        """Replace the buffers with other tensors under the same names."""
        for name, cache in caches.items():
            self.tables[name].put(cache)


WINDOW = "window"


def table_name(name: str) -> str:
    """Return the name of a cache's module in `tables`."""
    return "cache_" + module_name(name)


def module_name(key: str) -> str:
    """Return `key` without dots, which PyTorch forbids in names; distinct for distinct keys."""
    return key.replace("%", "%25").replace(".", "%2E")


class MissingCache(str):
    """A key that a state_dict lacks; in a strict load's error, its text says what to do.

    To `load_state_dict` it is a key like all others: modules do not know whether it is strict.
    """

    __slots__ = ()

    def __format__(self, spec: str) -> str:
        handler = ".".join(self.split(".")[:-3])  # before tables, the cache and the field
        return (
            f"{self!s}: the state_dict has no cache for the handler at {handler!r}, like that of "
            "a model trained without one. load_state_dict(state, strict=False) loads the rest "
            "and leaves the cache unchanged: a new one is empty, and handler.prefill can fill it."
        )


def check_loaded(handler: Any, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
    """Refuse a state_dict that does not fit, before `load_state_dict` copies the first tensor.

    PyTorch itself copies what fits, casts, and complains at the end. It does not tell modules
    whether it is strict: a handler needs all of its state, or, if strict=False allows it, none.
    """
    del arguments
    own = {prefix + key for key in handler.state_dict()}
    given = {key for key in state_dict if key.startswith(prefix)}
    if not own & given:
        return
    store: BufferStore = handler._store  # noqa: SLF001 - its own
    window = f"{prefix}tables.{WINDOW}.state"
    lacking = None if own - given != {window} else store.window
    if lacking is not None:  # saved without max_staleness
        given.add(window)
    if own != given:
        raise KeysError(
            f"the state_dict of the handler at {prefix!r} lacks {sorted(own - given)} and has "
            f"unknown {sorted(given - own)}: expected the state of a handler with the same "
            "fields and options. Make a handler with the saved fields and options, load into "
            "it, and pass its cache to handler.restore."
        )
    count, ages = 0, []
    for name, table in store.tables.items():
        at = f"{prefix}tables.{table_name(name)}."
        cache = table.view({each: state_dict[at + each] for each, _ in table.named_buffers()})
        check_layout(cache, table.cache, f"cache {name!r}")
        bad = nonfinite_rows(cache, handler.embedding_key, TORCH)
        if not cache.age.is_meta and bad.any():
            state_dict[at + "age"] = cache.age.masked_fill(bad, EMPTY)  # in load_state_dict's copy
            count += int(bad.sum())
        if not cache.age.is_meta:
            ages.append(TORCH.to_host(state_dict[at + "age"]))
    if lacking is not None:
        state_dict[window] = torch.from_numpy(window_over(ages)) if ages else lacking.window
    warn_of_nonfinite(count)
