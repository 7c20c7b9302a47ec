"""Rows and their ages: what a cache is, and which slots a step changes.

Plans decide with small integers; only `put_rows` and `Backend.write_rows` touch rows.
"""

from negcache_core.cache.filters import CacheFilterFn, IsInCacheFilterFn
from negcache_core.cache.manager import CacheManager
from negcache_core.cache.specs import FieldSpec
from negcache_core.cache.state import EMPTY, NegativeCache

__all__ = [
    "EMPTY",
    "CacheFilterFn",
    "CacheManager",
    "FieldSpec",
    "IsInCacheFilterFn",
    "NegativeCache",
]
