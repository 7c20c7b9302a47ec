"""One training step, and what happens between steps: prefill, refresh, save and load.

A handler holds the state of one or several caches, and runs these on it.
"""

from negcache_core.handlers.base import BaseHandler
from negcache_core.handlers.cache_loss_handler import CacheLossHandler
from negcache_core.handlers.multi_cache_loss_handler import MultiCacheLossHandler
from negcache_core.handlers.negative_cache_loss import NegativeCacheLoss

__all__ = ["BaseHandler", "CacheLossHandler", "MultiCacheLossHandler", "NegativeCacheLoss"]
