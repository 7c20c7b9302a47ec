"""The cache and its manager, under the published module name."""

from negcache_core import EMPTY, FieldSpec, NegativeCache
from negcache_core.cache.manager import CacheManager as _CacheManager

from ._backend import JAX

__all__ = ["EMPTY", "CacheManager", "FieldSpec", "NegativeCache"]


class CacheManager(_CacheManager):
    """The cache manager on JAX tensors; see `negcache_core.CacheManager`."""

    backend = JAX
