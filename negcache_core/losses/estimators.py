"""Estimators: the weights with which drawn negatives represent the whole cache.

An estimator turns what retrieval found into constants; the loss multiplies them with fresh,
differentiable scores. A new estimator is one function here and one entry in ESTIMATORS: nothing
else knows it by name.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from negcache_core.arrays._array import Array, cast
from negcache_core.arrays.numerics import log_sum_exp, sigmoid, soft_plus
from negcache_core.errors import OptionError
from negcache_core.retrieval.proposal import Pool


class SampledSoftmax(NamedTuple):
    """What is known about the softmax of B queries after each drew S rows.

    positive_scores: (B,) fresh
    log_partition:   (B,) log-sum-exp of the stale scores over usable slots, -inf for none
    log_full:        (B,) log-sum-exp of the negatives that count exactly, such as in-batch ones;
                     None if there are none
    drawn:           bool (B, S), False where nothing could be drawn
    pool:            all n rows that were drawn; None unless the estimator shares them
    """

    positive_scores: Array
    log_partition: Array
    drawn: Array
    log_full: Array | None = None
    pool: Pool | None = None

    def log_odds(self, *, xp: Any) -> Array:
        """Return (B,): log((1 - p+) / p+), the negatives' log-partition minus the positive."""
        rest = self.log_partition
        if self.log_full is not None:
            both = xp.concat([rest[:, None], self.log_full[:, None]], axis=1)
            rest = log_sum_exp(both, xp=xp)
        return rest - self.positive_scores

    def log_total(self, *, xp: Any) -> Array:
        """Return (B,): log Z, the log-partition of everything."""
        return soft_plus(self.log_odds(xp=xp), xp=xp) + self.positive_scores

    def cache_share(self, *, xp: Any) -> Array:
        """Return (B,): the probability of all slots together."""
        if self.log_full is None:  # the same number, but accurate even as p+ nears 1
            return sigmoid(self.log_odds(xp=xp), xp=xp)
        return xp.exp(self.log_partition - self.log_total(xp=xp))


class Weights(NamedTuple):
    """The cache's part of the surrogate: sum_k weight[i, k] * score(i, k). Constants.

    own:     (B, S) weights of a query's own S draws, or None
    every:   (B, n) weights of all rows that the batch drew, or None
    readout: (B,) weight of the cache's mean embedding under a query's softmax, which then gives the
             query's gradient; None for estimators without a readout
    stale:   (B, n) with a readout: weights that the drawn rows have in it
    """

    own: Array | None = None
    every: Array | None = None
    readout: Array | None = None
    stale: Array | None = None

    def each(self) -> Any:
        """Return the weights of drawn rows, of either kind."""
        return self.every if self.own is None else self.own

    def without(self, dropped: Array, *, xp: Any) -> "Weights":
        """Return these weights with 0 for drawn rows (n,) where `dropped` is True."""
        if self.own is not None:
            own = xp.where(xp.reshape(dropped, (-1, self.own.shape[1])), 0.0, self.own)
            return self._replace(own=own)
        every, stale = (
            None if each is None else xp.where(dropped[None, :], 0.0, each)
            for each in (self.every, self.stale)
        )
        return self._replace(every=every, stale=stale)


def paper(softmax: SampledSoftmax, *, xp: Any) -> Weights:
    """Weigh each of a query's S draws by the total probability of all slots, over S.

    Without other negatives that is (1 - p+) / S. Unbiased on a fresh cache:
    E[(1 - p+) (grad s_j - grad s+)] with j ~ softmax(t) is the gradient of the cross-entropy.
    Source: the paper, section 3.1, and the published `CacheClassificationLoss` (S = 1).

    >>> import numpy as np
    >>> paper(SampledSoftmax(np.zeros(1), np.log([3.0]), np.asarray([[True]])), xp=np).own
    array([[0.75]])
    """
    share = softmax.cache_share(xp=xp)
    return Weights(
        own=cast(softmax.drawn, share.dtype, xp) * share[:, None] / softmax.drawn.shape[1]
    )


def shared(softmax: SampledSoftmax, *, xp: Any) -> Weights:
    """Weigh every drawn row for every query: w_ik = p_i(j_k) / sum_l S q_l(j_k).

    p_i is the softmax over everything, q_l the proposal distribution of query l. This is the
    balance heuristic of multiple importance sampling (Veach and Guibas, SIGGRAPH 1995): unbiased,
    no further encoder work, and w_ik <= (1 - p+_i) / S. Goes beyond the paper.

    >>> import numpy as np
    >>> pool = Pool(np.zeros((1, 2)), np.zeros((1, 1)), -np.log([3.0]))
    >>> one = SampledSoftmax(np.zeros(1), np.log([3.0]), np.asarray([[True]]), None, pool)
    >>> shared(one, xp=np).every  # one query: what the paper's estimator gives
    array([[0.75]])
    """
    pool: Any = softmax.pool
    log_weight = pool.cross_scores - softmax.log_total(xp=xp)[:, None] - pool.log_proposal[None, :]
    return Weights(every=xp.exp(log_weight))


def exact_query(softmax: SampledSoftmax, *, xp: Any) -> Weights:
    """Weigh items as `shared` does; the query reads the whole cache, so its part has no noise.

    The drawn rows only correct the readout for staleness. Goes beyond the paper.

    >>> import numpy as np
    >>> pool = Pool(np.zeros((1, 2)), np.zeros((1, 1)), -np.log([3.0]))
    >>> one = SampledSoftmax(np.zeros(1), np.log([3.0]), np.asarray([[True]]), None, pool)
    >>> exact_query(one, xp=np).readout
    array([0.75])
    """
    weights = shared(softmax, xp=xp)
    return weights._replace(readout=softmax.cache_share(xp=xp), stale=weights.every)


class Estimator(NamedTuple):
    """An estimator: how it weighs, and what it needs.

    weigh:               (softmax, *, xp) -> Weights
    shares_draws:        whether every query weighs what all queries drew
    reads_out:           whether it needs the mean embedding under a query's softmax
    needs_linear_scores: whether the score must be linear in the query
    """

    weigh: Callable[..., Weights]
    shares_draws: bool = False
    reads_out: bool = False
    needs_linear_scores: bool = False


ESTIMATORS = {
    "paper": Estimator(paper),
    "shared": Estimator(shared, shares_draws=True),
    "exact_query": Estimator(
        exact_query, shares_draws=True, reads_out=True, needs_linear_scores=True
    ),
}


def corrected(
    softmax: SampledSoftmax, weights: Weights, moved: Array, *, xp: Any
) -> tuple[SampledSoftmax, Weights]:
    """Return the fresh softmax and its weights, as far as the drawn rows show them.

    moved: (B, S) or (B, n), fresh minus stale score of each weighed row

    A weight w grows by exp(moved), and the cache's partition by the self-normalised mean
    sum_k w_k exp(moved_k) / sum_k w_k. On a fresh cache nothing changes; on a stale one the bias of
    stale probabilities gives way to that of a ratio of estimates, and to its noise.

    >>> import numpy as np
    >>> softmax = SampledSoftmax(np.zeros(1), np.log([3.0]), np.asarray([[True]]))
    >>> corrected(softmax, paper(softmax, xp=np), np.log([[3.0]]), xp=np)[1].own  # 9 / (9 + 1)
    array([[0.9]])
    """
    each = weights.each()
    log_each = xp.where(each > 0, xp.log(xp.where(each > 0, each, 1.0)), -float("inf"))
    before, after = log_sum_exp(log_each, xp=xp), log_sum_exp(log_each + moved, xp=xp)
    change = xp.where(before > -float("inf"), after - before, 0.0)
    fresh = softmax._replace(log_partition=softmax.log_partition + change)
    shift = softmax.log_total(xp=xp) - fresh.log_total(xp=xp)
    each = xp.exp(log_each + moved + shift[:, None])
    if weights.own is not None:
        return fresh, weights._replace(own=each)
    weights = weights._replace(every=each)
    if weights.readout is not None:
        total = xp.exp(shift)
        weights = weights._replace(
            readout=total * weights.readout, stale=total[:, None] * weights.stale
        )
    return fresh, weights


def check_estimator(
    name: Any, *, transform: bool, top_k: bool, retrieval_fn: bool, correction: bool
) -> str:
    """Return `name` if it names an estimator that works with the other options, or raise.

    "auto" is the least noisy one that works.
    """
    if isinstance(name, str) and name == "auto":
        if retrieval_fn:
            return "paper"
        return "shared" if transform or top_k else "exact_query"
    if not isinstance(name, str) or name not in ESTIMATORS:
        raise OptionError(
            f"estimator is {name!r}: expected one of {sorted(['auto', *ESTIMATORS])}."
        )
    estimator = ESTIMATORS[name]
    if retrieval_fn and estimator.shares_draws:
        raise OptionError(
            f"estimator {name!r} needs the probabilities of the draws, which a retrieval_fn does "
            "not give: leave retrieval_fn out, or use estimator='paper'."
        )
    if retrieval_fn and correction:
        raise OptionError(
            "staleness_correction needs the probabilities of the draws, which a retrieval_fn "
            "does not give: leave one of the two out."
        )
    if transform and estimator.needs_linear_scores:
        raise OptionError(
            f"estimator {name!r} needs scores that are linear in the query, but a "
            "score_transform may be nonlinear: use scale= for a temperature, or "
            "estimator='shared'."
        )
    if top_k and estimator.reads_out:
        raise OptionError(
            f"estimator {name!r} reads out the whole cache, but with top_k a query competes with "
            "only k slots: leave top_k out, or use estimator='shared'."
        )
    return name
