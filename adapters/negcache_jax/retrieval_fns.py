"""Functions that choose negatives from the score matrix, under the published module name."""

from negcache_core.retrieval import AbstractRetrievalFn

from ._bound import GumbelMaxRetrievalFn, MaxScoreRetrievalFn, approximate_top_k_with_indices

__all__ = [
    "AbstractRetrievalFn",
    "GumbelMaxRetrievalFn",
    "MaxScoreRetrievalFn",
    "approximate_top_k_with_indices",
]
