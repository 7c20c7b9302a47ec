"""negcache for TensorFlow: train dual encoders against a cache of negatives.

>>> import tensorflow as tf, negcache_tensorflow as negcache
>>> specs = {"x": tf.io.FixedLenFeature([2], tf.float32),
...          "embedding": tf.io.FixedLenFeature([2], tf.float32)}
>>> handler = negcache.CacheLossHandler(
...     negcache.CacheManager(specs, cache_size=4),
...     negcache.CacheClassificationLoss("embedding", ("x",), scale=20.0),
...     embedding_key="embedding", data_keys=("x",))
>>> weights, x = tf.Variable(tf.ones((2, 2))), tf.eye(2)
>>> item_network = lambda features: features["x"] @ weights
>>> with tf.GradientTape() as tape:
...     loss = handler.update_cache_and_compute_loss(item_network, x, x @ weights, {"x": x})
>>> gradient = tape.gradient(loss, weights)
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
