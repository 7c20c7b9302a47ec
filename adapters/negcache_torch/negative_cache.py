"""The cache and its manager, under the published module name."""

from negcache_core.cache import EMPTY, FieldSpec, NegativeCache

from ._bound import CacheManager

__all__ = ["EMPTY", "CacheManager", "FieldSpec", "NegativeCache"]
