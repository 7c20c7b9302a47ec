"""From fresh embeddings to a loss: the estimators, the surrogate, and the loss that users call.

The only room whose arrays are differentiated.
"""

from negcache_core.losses.classification import CacheClassificationLoss
from negcache_core.losses.results import CacheLoss, CacheLossReturn

__all__ = ["CacheClassificationLoss", "CacheLoss", "CacheLossReturn"]
