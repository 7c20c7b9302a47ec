"""negcache for TensorFlow: train dual encoders against a cache of negatives.

>>> import tensorflow as tf, negcache_tensorflow as negcache
>>> weights, x = tf.Variable(tf.ones((2, 2))), tf.eye(2)
>>> item_network = lambda features: features["x"] @ weights
>>> loss_fn = negcache.NegativeCacheLoss(cache_size=4, features={"x": x}, embedding=x @ weights)
>>> with tf.GradientTape() as tape:
...     loss = loss_fn(item_network, x, x @ weights, {"x": x})
>>> gradient = tape.gradient(loss, weights)
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
