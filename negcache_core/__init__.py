"""negcache's core: cache bookkeeping and loss mathematics over the array API; no framework here.

Import the adapter of your framework instead (`import negcache_torch as negcache`): it has the same
names. This package runs on NumPy, which is the reference.
"""

from negcache_core.cache.filters import CacheFilterFn, IsInCacheFilterFn
from negcache_core.cache.manager import CacheManager
from negcache_core.cache.specs import FieldSpec
from negcache_core.cache.state import EMPTY, NegativeCache
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
from negcache_core.handlers.cache_loss_handler import CacheLossHandler, MultiCacheLossHandler
from negcache_core.losses.classification import CacheClassificationLoss
from negcache_core.losses.results import CacheLoss, CacheLossReturn
from negcache_core.retrieval.result import Retrieval
from negcache_core.retrieval.retrieval_fns import (
    AbstractRetrievalFn,
    GumbelMaxRetrievalFn,
    MaxScoreRetrievalFn,
)
from negcache_core.retrieval.top_k import approximate_top_k_with_indices
from negcache_core.tools.plot import plot_cache
from negcache_core.tools.step_cost import scaling
from negcache_core.tools.step_cost_report import Scaling

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
