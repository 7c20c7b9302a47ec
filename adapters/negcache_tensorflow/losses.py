"""Losses, under the published module name."""

from negcache_core.losses import CacheLoss, CacheLossReturn

from ._bound import CacheClassificationLoss, DistributedCacheClassificationLoss

__all__ = [
    "CacheClassificationLoss",
    "CacheLoss",
    "CacheLossReturn",
    "DistributedCacheClassificationLoss",
]
