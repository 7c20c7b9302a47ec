"""The cache and its manager, under the published module name."""

from negcache_core import EMPTY, FieldSpec, NegativeCache
from negcache_core.cache.manager import CacheManager as _CacheManager

from ._backend import TENSORFLOW

__all__ = ["EMPTY", "CacheManager", "FieldSpec", "NegativeCache"]


class CacheManager(_CacheManager):
    """The cache manager on TensorFlow tensors; see `negcache_core.CacheManager`."""

    backend = TENSORFLOW
