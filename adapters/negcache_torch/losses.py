"""Losses as modules: a scale or a transform with parameters is one of the loss's parameters."""

from torch import nn

from negcache_core import CacheLoss, CacheLossReturn
from negcache_core.losses import CacheClassificationLoss as _CacheClassificationLoss

from ._backend import TORCH

__all__ = ["CacheClassificationLoss", "CacheLoss", "CacheLossReturn"]


class CacheClassificationLoss(_CacheClassificationLoss, nn.Module):
    """Cross-entropy against the cache; see `negcache_core.CacheClassificationLoss`."""

    backend = TORCH
    forward = _CacheClassificationLoss.__call__
    __call__ = nn.Module.__call__
