"""Losses as modules: a scale or a transform with variables is tracked by the loss."""

import tensorflow as tf

from negcache_core import CacheLoss, CacheLossReturn
from negcache_core.losses import CacheClassificationLoss as _CacheClassificationLoss

from ._backend import TENSORFLOW

__all__ = ["CacheClassificationLoss", "CacheLoss", "CacheLossReturn"]


class CacheClassificationLoss(_CacheClassificationLoss, tf.Module):
    """Cross-entropy against the cache; see `negcache_core.CacheClassificationLoss`."""

    backend = TENSORFLOW
