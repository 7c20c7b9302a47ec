"""Filters of new items, under the published module name."""

from negcache_core.cache.filters import CacheFilterFn
from negcache_core.cache.filters import IsInCacheFilterFn as _IsInCacheFilterFn

from ._backend import TENSORFLOW

__all__ = ["CacheFilterFn", "IsInCacheFilterFn"]


class IsInCacheFilterFn(_IsInCacheFilterFn):
    """True for items that are not in the cache; see `negcache_core.IsInCacheFilterFn`."""

    backend = TENSORFLOW
