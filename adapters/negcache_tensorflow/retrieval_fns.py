"""Functions that choose negatives from the score matrix, under the published module name."""

import tensorflow as tf

from negcache_core.arrays.validation import as_array
from negcache_core.retrieval.retrieval_fns import AbstractRetrievalFn
from negcache_core.retrieval.retrieval_fns import GumbelMaxRetrievalFn as _GumbelMaxRetrievalFn
from negcache_core.retrieval.retrieval_fns import MaxScoreRetrievalFn as _MaxScoreRetrievalFn
from negcache_core.retrieval.top_k import approximate_top_k_with_indices as _top_k

from ._backend import TENSORFLOW

__all__ = [
    "AbstractRetrievalFn",
    "GumbelMaxRetrievalFn",
    "MaxScoreRetrievalFn",
    "approximate_top_k_with_indices",
]


class MaxScoreRetrievalFn(_MaxScoreRetrievalFn):
    """The hardest negative; see `negcache_core.MaxScoreRetrievalFn`."""

    backend = TENSORFLOW


class GumbelMaxRetrievalFn(_GumbelMaxRetrievalFn, tf.Module):
    """Gumbel-max sampling; see `negcache_core.GumbelMaxRetrievalFn`."""

    backend = TENSORFLOW


def approximate_top_k_with_indices(scores: tf.Tensor, k: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Return the best of each of k contiguous groups; see `negcache_core`'s function."""
    return _top_k(as_array(scores, "scores", TENSORFLOW), k, xp=TENSORFLOW.xp)
