"""negcache for PyTorch: train dual encoders against a cache of negatives.

>>> import torch, negcache_torch as negcache
>>> tower, x = torch.nn.Linear(2, 2), torch.eye(2)
>>> item_network = lambda features: tower(features["x"])
>>> loss_fn = negcache.NegativeCacheLoss(cache_size=4, features={"x": x}, embedding=tower(x))
>>> loss = loss_fn(item_network, x, tower(x), {"x": x})
>>> loss.backward()
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
