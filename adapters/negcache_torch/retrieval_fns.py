"""Functions that choose negatives from the score matrix, under the published module name."""

from torch import nn

from negcache_core.retrieval.retrieval_fns import AbstractRetrievalFn
from negcache_core.retrieval.retrieval_fns import GumbelMaxRetrievalFn as _GumbelMaxRetrievalFn
from negcache_core.retrieval.retrieval_fns import MaxScoreRetrievalFn as _MaxScoreRetrievalFn
from negcache_core.retrieval.top_k import approximate_top_k_with_indices

from ._backend import TORCH

__all__ = [
    "AbstractRetrievalFn",
    "GumbelMaxRetrievalFn",
    "MaxScoreRetrievalFn",
    "approximate_top_k_with_indices",
]


class MaxScoreRetrievalFn(_MaxScoreRetrievalFn):
    """The hardest negative; see `negcache_core.MaxScoreRetrievalFn`."""

    backend = TORCH


class GumbelMaxRetrievalFn(_GumbelMaxRetrievalFn, nn.Module):
    """Gumbel-max sampling; see `negcache_core.GumbelMaxRetrievalFn`."""

    backend = TORCH
