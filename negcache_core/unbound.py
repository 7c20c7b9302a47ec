"""The public names that belong to no array library: the same in the core and in every adapter."""

from negcache_core.cache.filters import CacheFilterFn
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
    TrainingWarning,
)
from negcache_core.losses.results import CacheLoss, CacheLossReturn
from negcache_core.retrieval.result import Retrieval
from negcache_core.retrieval.retrieval_fns import AbstractRetrievalFn
from negcache_core.tools.plot import plot_cache
from negcache_core.tools.step_cost import scaling
from negcache_core.tools.step_cost_report import Scaling

__all__ = [
    "EMPTY",
    "AbstractRetrievalFn",
    "CacheFilterFn",
    "CacheLoss",
    "CacheLossReturn",
    "CapacityError",
    "CheckpointError",
    "DTypeError",
    "DeviceError",
    "FieldSpec",
    "KeysError",
    "KindError",
    "NegativeCache",
    "NegcacheError",
    "NonFiniteWarning",
    "OptionError",
    "Retrieval",
    "Scaling",
    "ShapeError",
    "TrainingWarning",
    "plot_cache",
    "scaling",
]
