"""Handlers as modules: rows, ages and generator state are buffers."""

from torch import nn

from negcache_core import NegativeCache
from negcache_core.handlers import BaseHandler
from negcache_core.handlers import CacheLossHandler as _CacheLossHandler
from negcache_core.handlers import MultiCacheLossHandler as _MultiCacheLossHandler

from ._backend import TORCH
from ._state import CacheTable, module_name

__all__ = ["CacheLossHandler", "MultiCacheLossHandler"]


class _ModuleHandler(BaseHandler, nn.Module):
    """A handler whose state is in `nn.Module` buffers; nothing of it is outside the state_dict."""

    backend = TORCH

    def _hold(self) -> None:
        caches = self._init_caches()
        self.tables = nn.ModuleDict(
            {"cache_" + module_name(name): CacheTable(cache) for name, cache in caches.items()}
        )
        self._table_names = {name: "cache_" + module_name(name) for name in caches}

    def _caches(self) -> dict[str, NegativeCache]:
        return {name: self.tables[key].cache for name, key in self._table_names.items()}


class CacheLossHandler(_ModuleHandler, _CacheLossHandler):
    """One cache and its step; see `negcache_core.CacheLossHandler`."""

    forward = _CacheLossHandler.update_cache_and_compute_loss


class MultiCacheLossHandler(_ModuleHandler, _MultiCacheLossHandler):
    """Several caches that count as one; see `negcache_core.MultiCacheLossHandler`."""

    forward = _MultiCacheLossHandler.update_cache_and_compute_loss
