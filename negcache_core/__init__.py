"""negcache's core: cache bookkeeping and loss mathematics over the array API; no framework here.

Import the adapter of your framework instead (`import negcache_torch as negcache`): it has the same
names. This package runs on NumPy, which is the reference.
"""

from negcache_core import unbound
from negcache_core.cache.filters import IsInCacheFilterFn
from negcache_core.cache.manager import CacheManager
from negcache_core.handlers.cache_loss_handler import CacheLossHandler
from negcache_core.handlers.multi_cache_loss_handler import MultiCacheLossHandler
from negcache_core.handlers.negative_cache_loss import NegativeCacheLoss
from negcache_core.losses.classification import CacheClassificationLoss
from negcache_core.retrieval.retrieval_fns import GumbelMaxRetrievalFn, MaxScoreRetrievalFn
from negcache_core.retrieval.top_k import approximate_top_k_with_indices
from negcache_core.tools.chunks import in_chunks
from negcache_core.unbound import *  # noqa: F403 - what its __all__ lists

__version__ = "0.1.0"

__all__ = [
    "CacheClassificationLoss",
    "CacheLossHandler",
    "CacheManager",
    "GumbelMaxRetrievalFn",
    "IsInCacheFilterFn",
    "MaxScoreRetrievalFn",
    "MultiCacheLossHandler",
    "NegativeCacheLoss",
    "approximate_top_k_with_indices",
    "in_chunks",
]
__all__ += unbound.__all__
