"""negcache for JAX: train dual encoders against a cache of negatives.

>>> import jax, jax.numpy as jnp, negcache_jax as negcache
>>> x = jnp.eye(2)
>>> loss_fn = negcache.NegativeCacheLoss(cache_size=4, features={"x": x}, embedding=2)
>>> def step(weights, state, x):
...     item_network = lambda features: features["x"] @ weights
...     return loss_fn(state, item_network, x, item_network({"x": x}), {"x": x})
>>> state = loss_fn.init(jax.random.key(0))
>>> gradient_of_step = jax.jit(jax.value_and_grad(step, has_aux=True), donate_argnums=1)
>>> (loss, state), gradient = gradient_of_step(jnp.eye(2), state, x)
"""

from negcache_core import __version__, unbound
from negcache_core.unbound import *  # noqa: F403 - what its __all__ lists

from . import filter_fns, handlers, losses, negative_cache, retrieval_fns
from ._bound import in_chunks
from .filter_fns import *  # noqa: F403
from .handlers import *  # noqa: F403
from .losses import *  # noqa: F403
from .negative_cache import *  # noqa: F403
from .retrieval_fns import *  # noqa: F403

__all__ = [
    "__version__",
    "filter_fns",
    "handlers",
    "in_chunks",
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
