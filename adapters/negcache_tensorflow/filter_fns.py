"""Filters of new items, under the published module name."""

from negcache_core.cache import CacheFilterFn

from ._bound import IsInCacheFilterFn

__all__ = ["CacheFilterFn", "IsInCacheFilterFn"]
