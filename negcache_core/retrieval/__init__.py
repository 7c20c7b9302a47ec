"""Score the cache and draw negatives: integers and constants, nothing is differentiated.

A tile of the cache is scored at a time; the scores of the whole are never in memory.
"""

from negcache_core.retrieval.result import Retrieval
from negcache_core.retrieval.retrieval_fns import (
    AbstractRetrievalFn,
    GumbelMaxRetrievalFn,
    MaxScoreRetrievalFn,
)
from negcache_core.retrieval.top_k import approximate_top_k_with_indices

__all__ = [
    "AbstractRetrievalFn",
    "GumbelMaxRetrievalFn",
    "MaxScoreRetrievalFn",
    "Retrieval",
    "approximate_top_k_with_indices",
]
