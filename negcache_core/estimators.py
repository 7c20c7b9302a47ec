"""Estimators: the weights with which drawn negatives stand for the whole cache.

An estimator turns what retrieval knows into constants; the loss multiplies them with fresh,
differentiable scores. Each new estimator is one function here and one entry in ESTIMATORS.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from negcache_core._array import Array, cast
from negcache_core.errors import OptionError
from negcache_core.scoring import sigmoid


class Weights(NamedTuple):
    """The surrogate is  sum_k negative[i, k] * score(i, k) - positive[i] * score(i, +).

    positive: (B,); negative: (B, S), for the query's own S draws. Constants.
    """

    positive: Array
    negative: Array


def paper(positive_scores: Array, log_partition: Array, drawn: Array, *, xp: Any) -> Weights:
    """Weigh each of a query's S draws by (1 - p+) / S, and its positive by their sum.

    p+ = exp(s+) / (exp(s+) + sum_j exp(t_j)), so 1 - p+ = sigmoid(log_partition - s+), which keeps
    its relative accuracy as p+ nears 1. Unbiased on a fresh cache:
    E[(1 - p+) (grad s_j - grad s+)] with j ~ softmax(t) is the gradient of the cross-entropy.
    Source: the paper, section 3.1, and the published `CacheClassificationLoss` (S = 1).

    >>> import numpy as np
    >>> paper(np.zeros(1), np.log([3.0]), np.asarray([[True]]), xp=np).negative
    array([[0.75]])
    """
    miss = sigmoid(log_partition - positive_scores, xp=xp)
    negative = cast(drawn, miss.dtype, xp) * miss[:, None] / drawn.shape[1]
    return Weights(xp.sum(negative, axis=1), negative)


ESTIMATORS: dict[str, Callable[..., Weights]] = {"paper": paper}


def check_estimator(name: Any) -> str:
    """Return `name` if it names an estimator, or raise OptionError."""
    if name not in ESTIMATORS:
        raise OptionError(f"estimator is {name!r}: expected one of {sorted(ESTIMATORS)}.")
    return str(name)
