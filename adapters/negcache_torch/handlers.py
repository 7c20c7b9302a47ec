"""Handlers as modules: rows, ages and generator state are buffers."""

from typing import Any

from torch import Tensor, nn

from negcache_core import NegativeCache, OptionError
from negcache_core.handlers.cache_loss_handler import CacheLossHandler as _CacheLossHandler
from negcache_core.handlers.cache_loss_handler import (
    MultiCacheLossHandler as _MultiCacheLossHandler,
)
from negcache_core.handlers.step import BaseHandler

from ._backend import TORCH
from ._generator import refuse_recomputation
from ._state import CacheTable, check_loaded, module_name
from .losses import DistributedCacheClassificationLoss

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
        self.register_load_state_dict_pre_hook(check_loaded)

    def distributed_state_dict(self) -> dict[str, Tensor]:
        """Return the state for torch.distributed.checkpoint: each table is one shard of a DTensor.

        Saved from one number of ranks it loads on another, in place: make the handler with the same
        cache_size, and pass this to `dcp.load`. Only for a handler whose cache is in shards.
        """
        if not isinstance(self.cache_loss, DistributedCacheClassificationLoss):
            raise OptionError(
                "distributed_state_dict is for a cache in shards: this handler's loss is a "
                f"{type(self.cache_loss).__name__}. Use state_dict()."
            )
        state = self.state_dict()
        for name, key in self._table_names.items():
            slots = self._managers[name].cache_size
            for field in [each for each in state if each.startswith(f"tables.{key}.")]:
                state[field] = self.cache_loss.replicas.as_shard(state[field], slots)
        return state

    def _check(self, *arguments: Any) -> None:
        refuse_recomputation()
        super()._check(*arguments)

    def _caches(self) -> dict[str, NegativeCache]:
        return {name: self.tables[key].cache for name, key in self._table_names.items()}


class CacheLossHandler(_ModuleHandler, _CacheLossHandler):
    """One cache and its step; see `negcache_core.CacheLossHandler`."""

    forward = _CacheLossHandler.update_cache_and_compute_loss


class MultiCacheLossHandler(_ModuleHandler, _MultiCacheLossHandler):
    """Several caches that count as one; see `negcache_core.MultiCacheLossHandler`."""

    forward = _MultiCacheLossHandler.update_cache_and_compute_loss
