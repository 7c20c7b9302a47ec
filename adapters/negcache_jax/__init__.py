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

from negcache_core import __version__, unbound
from negcache_core.unbound import *  # noqa: F403 - what its __all__ lists

from . import filter_fns, handlers, losses, negative_cache, retrieval_fns
from .filter_fns import *  # noqa: F403
from .handlers import *  # noqa: F403
from .losses import *  # noqa: F403
from .negative_cache import *  # noqa: F403
from .retrieval_fns import *  # noqa: F403

__all__ = [
    "__version__",
    "filter_fns",
    "handlers",
    "losses",
    "negative_cache",
    "retrieval_fns",
]
__all__ += unbound.__all__
__all__ += filter_fns.__all__
__all__ += handlers.__all__
__all__ += losses.__all__
__all__ += negative_cache.__all__
__all__ += retrieval_fns.__all__
