"""negcache's core: cache bookkeeping and loss mathematics over the array API; no framework here.

Import the adapter of your framework instead (`import negcache_torch as negcache`): it has the same
names. This package runs on NumPy, which is the reference.
"""

from negcache_core.errors import (
    CapacityError,
    CheckpointError,
    DeviceError,
    DTypeError,
    KeysError,
    KindError,
    NegcacheError,
    NonFiniteWarning,
    OptionError,
    ShapeError,
)
from negcache_core.figures import plot_cache
from negcache_core.filters import CacheFilterFn, IsInCacheFilterFn
from negcache_core.handlers import CacheLossHandler, MultiCacheLossHandler
from negcache_core.losses import CacheClassificationLoss
from negcache_core.manager import CacheManager
from negcache_core.results import CacheLoss, CacheLossReturn
from negcache_core.retrieval import Retrieval
from negcache_core.sampling import AbstractRetrievalFn, GumbelMaxRetrievalFn, MaxScoreRetrievalFn
from negcache_core.scale import Scaling, scaling
from negcache_core.specs import FieldSpec
from negcache_core.state import EMPTY, NegativeCache
from negcache_core.topk import approximate_top_k_with_indices

__version__ = "0.1.0"

__all__ = [
    "EMPTY",
    "AbstractRetrievalFn",
    "CacheClassificationLoss",
    "CacheFilterFn",
    "CacheLoss",
    "CacheLossHandler",
    "CacheLossReturn",
    "CacheManager",
    "CapacityError",
    "CheckpointError",
    "DTypeError",
    "DeviceError",
    "FieldSpec",
    "GumbelMaxRetrievalFn",
    "IsInCacheFilterFn",
    "KeysError",
    "KindError",
    "MaxScoreRetrievalFn",
    "MultiCacheLossHandler",
    "NegativeCache",
    "NegcacheError",
    "NonFiniteWarning",
    "OptionError",
    "Retrieval",
    "Scaling",
    "ShapeError",
    "approximate_top_k_with_indices",
    "plot_cache",
    "scaling",
]
