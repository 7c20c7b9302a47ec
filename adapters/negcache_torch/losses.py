"""Losses as modules: a scale or a transform with parameters is one of the loss's parameters."""

from functools import cached_property
from typing import Any

from torch import Tensor, nn

from negcache_core import CacheLoss, CacheLossReturn
from negcache_core.losses.classification import CacheClassificationLoss as _CacheClassificationLoss
from negcache_core.sharding.placement import ShardedLoss

from ._backend import TORCH
from ._replicas import ProcessGroup

__all__ = [
    "CacheClassificationLoss",
    "CacheLoss",
    "CacheLossReturn",
    "DistributedCacheClassificationLoss",
]


class CacheClassificationLoss(_CacheClassificationLoss, nn.Module):
    """Cross-entropy against the cache; see `negcache_core.CacheClassificationLoss`."""

    backend = TORCH
    forward = _CacheClassificationLoss.__call__
    __call__ = nn.Module.__call__


class DistributedCacheClassificationLoss(ShardedLoss, nn.Module):
    """Cross-entropy against a cache that is cut into shards, one on each rank.

    group: a process group of torch.distributed; None for all ranks

    See `negcache_core.sharding.ShardedLoss`.
    """

    backend = TORCH
    forward = ShardedLoss.__call__
    __call__ = nn.Module.__call__

    def __init__(self, *arguments: Any, group: Any = None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.group = group

    @cached_property
    def replicas(self) -> ProcessGroup:
        """The ranks of the group."""
        return ProcessGroup(self.group)

    def _share_generator(self, like: Tensor) -> None:
        state = self.generator.state
        (states,) = self.replicas.gather([state[None].to(like.device)], (1,) * self.replicas.count)
        state.copy_(states[0])
