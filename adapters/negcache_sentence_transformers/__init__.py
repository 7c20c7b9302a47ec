"""negcache for sentence-transformers: a loss for its trainer.

>>> from negcache_sentence_transformers import NegativeCacheLoss, keep_cache
"""

from .loss import NegativeCacheLoss
from .trainer import keep_cache

__all__ = ["NegativeCacheLoss", "keep_cache"]
