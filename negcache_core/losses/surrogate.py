"""The surrogate: constants times fresh, differentiable scores, whose gradient is the estimate."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from negcache_core.arrays._array import Array, cast, length
from negcache_core.arrays.numerics import log_sum_exp, sigmoid
from negcache_core.losses.estimators import SampledSoftmax, Weights
from negcache_core.retrieval.prefixes import Prefixes, at_widest
from negcache_core.retrieval.scorer import Scorer


class FullNegatives(NamedTuple):
    """Negatives that count exactly: scores (B, m), differentiable, and which count, (B, m).

    shift: (m,) subtracted from the scores in the softmax; None for nothing
    """

    scores: Array
    counts: Array | None
    shift: Array | None = None

    def logits(self, constant: Callable[[Array], Array], xp: Any) -> Array:
        """Return (B, m) constants: what enters the softmax, -inf for what does not count."""
        scores = constant(self.scores)
        if self.shift is not None:
            scores = scores - self.shift[None, :]
        return scores if self.counts is None else xp.where(self.counts, scores, -float("inf"))


def log_partition_of(
    parts: Sequence[FullNegatives], constant: Callable[[Array], Array], xp: Any
) -> Array | None:
    """Return (B,): the log-sum-exp of all exact negatives; None if there are none."""
    if not parts:
        return None
    logits = [part.logits(constant, xp) for part in parts]
    return log_sum_exp(logits[0] if len(logits) == 1 else xp.concat(logits, axis=1), xp=xp)


def full_terms(
    parts: Sequence[FullNegatives],
    softmax: SampledSoftmax,
    constant: Callable[[Array], Array],
    xp: Any,
) -> Array:
    """Return (B,): the exact negatives' term of the surrogate, sum_j p_j s_j."""
    log_total = softmax.log_total(xp=xp)[:, None]
    total: Any = None
    for part in parts:
        probabilities = xp.exp(part.logits(constant, xp) - log_total)
        term = xp.sum(probabilities * part.scores, axis=1)
        total = term if total is None else total + term
    return total


def positive_weight(softmax: SampledSoftmax, weights: Weights, *, xp: Any) -> Array:
    """Return (B,): 1 - p+, and so 0 for a query without any negative.

    The cache's share is left out for a query whose draws do not count: without a push there must
    be no pull.
    """
    miss = sigmoid(softmax.log_odds(xp=xp), xp=xp)
    if weights.own is None:
        return miss
    share = miss if softmax.log_full is None else softmax.cache_share(xp=xp)
    return miss - (share - xp.sum(weights.own, axis=1))


def cache_term(
    weights: Weights,
    scorer: Scorer,
    queries: Array,
    fresh: Array,
    *,
    readout: Any,
    stale: Array,
    constant: Callable[[Array], Array],
) -> Array:
    """Return (B,): the drawn rows' term of the surrogate.

    queries (B, D), fresh (n, D): differentiable; stale (n, D): the same rows as the cache has them
    readout: (B, D) mean of the cache under each query's softmax. Then the query's (and the scale's)
             gradient comes from it, corrected for staleness, and the items' from the drawn rows:
             scale q . sg(p_cache O + sum_k w_k f_k - sum_k w_k e_k) + sum_k w_k sg(scale q) . f_k
             None: the query's gradient too comes from the drawn rows
    """
    xp = scorer.xp
    if weights.own is not None:
        draws = weights.own.shape[1]
        scores = scorer.pairs(queries, xp.reshape(fresh, (-1, draws, fresh.shape[1])))
        return xp.sum(weights.own * scores, axis=1)
    if readout is None or weights.readout is None:
        return xp.sum(weights.every * scorer.cross(queries, fresh), axis=1)
    target = weights.readout[:, None] * cast(readout, scorer.dtype, xp)
    target = target + xp.matmul(weights.every, constant(fresh))
    target = target - xp.matmul(weights.stale, cast(stale, scorer.dtype, xp))
    scaled = scorer.scaled(queries)
    by_item = scorer._replace(scale=None).cross(constant(scaled), fresh)
    return xp.sum(scaled * constant(target), axis=1) + xp.sum(weights.every * by_item, axis=1)


def widest_term(
    weights: Weights,
    scorer: Scorer,
    prefixes: Prefixes,
    scaled: Array,
    *,
    readout: Array,
    stale: Array,
    constant: Callable[[Array], Array],
) -> Array:
    """Return (B,): what a readout at the last width adds to the drawn rows' term there.

    scaled: (B, D + W) the queries, differentiable; weights are of B * W, by query and width
    readout: (B, w); stale (n, D): the drawn rows as the cache has them

    The drawn rows' term has the queries' gradient too, so here their stale part is taken from it:
    scale q . sg(p_cache O - sum_k w_k e_k)
    """
    xp, count = scorer.xp, prefixes.number
    share: Any = weights.readout
    share = xp.reshape(share, (-1, count))[:, -1:]
    rows = at_widest(cast(stale, scorer.dtype, xp), prefixes, xp)
    target = share * cast(readout, scorer.dtype, xp)
    target = target - xp.matmul(last_width(weights.stale, prefixes, xp), rows)
    unit = scaled[:, : prefixes.widest] * scaled[:, -1:]
    return xp.sum(unit * constant(target), axis=1)


def last_width(values: Any, prefixes: Prefixes, xp: Any) -> Any:
    """Return the values of the last width, (B, n), from values (B * W, n)."""
    rows = length(values, xp) // prefixes.number
    return xp.reshape(values, (rows, prefixes.number, length(values, xp, 1)))[:, -1, :]
