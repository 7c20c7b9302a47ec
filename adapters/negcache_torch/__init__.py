"""negcache for PyTorch: train dual encoders against a cache of negatives.

>>> import torch, negcache_torch as negcache
>>> specs = {"x": negcache.FieldSpec((2,), torch.float32),
...          "embedding": negcache.FieldSpec((2,), torch.float32)}
>>> handler = negcache.CacheLossHandler(
...     negcache.CacheManager(specs, cache_size=4),
...     negcache.CacheClassificationLoss("embedding", ("x",), scale=20.0),
...     embedding_key="embedding", data_keys=("x",))
>>> tower, x = torch.nn.Linear(2, 2), torch.eye(2)
>>> item_network = lambda features: tower(features["x"])
>>> loss = handler.update_cache_and_compute_loss(item_network, x, tower(x), {"x": x})
>>> loss.backward()
"""

from negcache_core import (
    EMPTY,
    CacheLoss,
    CacheLossReturn,
    CapacityError,
    CheckpointError,
    DeviceError,
    DTypeError,
    FieldSpec,
    KeysError,
    KindError,
    NegativeCache,
    NegcacheError,
    NonFiniteWarning,
    OptionError,
    Retrieval,
    Scaling,
    ShapeError,
    __version__,
    plot_cache,
    scaling,
)

from . import filter_fns, handlers, losses, negative_cache, retrieval_fns
from .filter_fns import CacheFilterFn, IsInCacheFilterFn
from .handlers import CacheLossHandler, MultiCacheLossHandler
from .losses import CacheClassificationLoss, DistributedCacheClassificationLoss
from .negative_cache import CacheManager
from .retrieval_fns import (
    AbstractRetrievalFn,
    GumbelMaxRetrievalFn,
    MaxScoreRetrievalFn,
    approximate_top_k_with_indices,
)

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
    "DistributedCacheClassificationLoss",
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
    "__version__",
    "approximate_top_k_with_indices",
    "filter_fns",
    "handlers",
    "losses",
    "negative_cache",
    "plot_cache",
    "retrieval_fns",
    "scaling",
]
