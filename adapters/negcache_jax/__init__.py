"""negcache for JAX: train dual encoders against a cache of negatives.

>>> import jax, jax.numpy as jnp, negcache_jax as negcache
>>> specs = {"x": negcache.FieldSpec((2,), jnp.float32),
...          "embedding": negcache.FieldSpec((2,), jnp.float32)}
>>> handler = negcache.CacheLossHandler(
...     negcache.CacheManager(specs, cache_size=4),
...     negcache.CacheClassificationLoss("embedding", ("x",), scale=20.0),
...     embedding_key="embedding", data_keys=("x",))
>>> def step(weights, state, x):
...     item_network = lambda features: features["x"] @ weights
...     return handler.update_cache_and_compute_loss(
...         state, item_network, x, item_network({"x": x}), {"x": x})
>>> state, x = handler.init(jax.random.key(0)), jnp.eye(2)
>>> gradient_of_step = jax.jit(jax.value_and_grad(step, has_aux=True), donate_argnums=1)
>>> (loss, state), gradient = gradient_of_step(jnp.eye(2), state, x)
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
from .handlers import CacheLossHandler, HandlerState, MultiCacheLossHandler
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
    "HandlerState",
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
