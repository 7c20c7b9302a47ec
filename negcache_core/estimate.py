"""The loss of each query from fresh embeddings: a value from stale scores, and the gradient."""

from typing import Any, NamedTuple

from negcache_core._array import Array, cast
from negcache_core.backend import Backend
from negcache_core.estimators import ESTIMATORS, Law, Weights, corrected
from negcache_core.metrics import finite_rows, staleness, step_metrics, weight_metrics
from negcache_core.retrieval import Retrieval
from negcache_core.scoring import Scorer, sigmoid, soft_plus
from negcache_core.surrogates import (
    Exact,
    cache_term,
    exact_terms,
    log_partition_of,
    positive_weight,
)


class Embedded(NamedTuple):
    """Fresh embeddings, differentiable: queries, positives (B, D); drawn (n, D); hard (B, H, D).

    every_positive, every_drawn: those of all replicas, where there are several; else None
    """

    queries: Array
    positives: Array
    drawn: Array
    hard: Array | None = None
    every_positive: Array | None = None
    every_drawn: Array | None = None


class Estimate(NamedTuple):
    """What a step estimates, by query or by drawn row; only `training` is differentiable.

    training:      (B,) the surrogate
    interpretable: (B,) the cross-entropy, in nats
    fresh:         (n, D) the drawn rows' embeddings in the cache's dtype; finite: bool (n,)
    staleness:     (B,) mean of a query's drawn rows
    metrics:       scalars, see `step_metrics` and `weight_metrics`
    """

    training: Array
    interpretable: Array
    fresh: Array
    finite: Array
    staleness: Array
    metrics: dict[str, Array]


def estimate(
    embedded: Embedded,
    retrieval: Retrieval,
    scorer: Scorer,
    backend: Backend,
    *,
    estimator: str,
    staleness_correction: bool,
) -> Estimate:
    """Return the estimate of one step; see `CacheClassificationLoss.loss_from_negatives`."""
    xp, constant = backend.xp, backend.stop_gradient
    queries, stale = embedded.queries, retrieval.stale_embeddings
    positive = scorer.pairs(queries, embedded.positives)
    parts = _exact_negatives(embedded, retrieval, scorer)
    law = Law(
        constant(positive),
        cast(retrieval.log_partition, scorer.dtype, xp),
        retrieval.drawn,
        log_partition_of(parts, constant, xp),
        retrieval.pool,
    )
    log_odds = law.log_odds(xp=xp)
    weights, drawn, pool = ESTIMATORS[estimator](law, xp=xp), embedded.drawn, retrieval.pool
    with backend.no_gradient():
        fresh = cast(constant(drawn), stale.dtype, xp)
        finite = finite_rows(fresh, xp=xp)
    weighed, stale_weighed = drawn, stale
    if pool is not None:
        every, stale_weighed = embedded.every_drawn, pool.stale
        weighed = drawn if every is None else every
        # A row that is not finite would reach every query: it counts as not drawn.
        usable = finite_rows(cast(constant(weighed), stale.dtype, xp), xp=xp)
        weights = weights.without(~usable, xp=xp)
        weighed = xp.where(usable[:, None], weighed, 0.0)
    if staleness_correction:
        with backend.no_gradient():
            moved = _moved(weights, scorer, constant(queries), constant(weighed), stale_weighed)
            law, weights = corrected(law, weights, constant(moved), xp=xp)
    training = cache_term(
        weights,
        scorer,
        queries,
        weighed,
        readout=retrieval.readout,
        stale=stale_weighed,
        constant=constant,
    )
    training = training - positive_weight(law, weights, xp=xp) * positive
    if parts:
        training = training + exact_terms(parts, law, constant, xp)

    with backend.no_gradient():
        kept = finite_rows(cast(constant(embedded.positives), stale.dtype, xp), xp=xp)
        was_drawn = xp.reshape(retrieval.drawn, (-1,))
        wide = cast(fresh, scorer.dtype, xp)
        row_staleness = staleness(cast(stale, scorer.dtype, xp), wide, xp=xp)
        row_staleness = xp.where(was_drawn & finite, row_staleness, 0.0)
        metrics = step_metrics(
            retrieval,
            soft_plus(log_odds, xp=xp),
            sigmoid(log_odds, xp=xp),
            row_staleness,
            xp.concat([was_drawn & ~finite, ~kept]),
            xp=xp,
        )
        constants = cast(constant(weighed), scorer.dtype, xp)
        metrics.update(weight_metrics(weights, constants, xp=xp))
        by_query = xp.reshape(row_staleness, (-1, retrieval.drawn.shape[1]))
    return Estimate(
        training,
        soft_plus(log_odds, xp=xp),
        fresh,
        finite,
        xp.mean(by_query, axis=1),
        metrics,
    )


def _exact_negatives(embedded: Embedded, retrieval: Retrieval, scorer: Scorer) -> list[Exact]:
    """Return what competes in full: in-batch positives and hard negatives, where there are such."""
    parts = []
    if retrieval.others is not None:
        every = embedded.every_positive
        every = embedded.positives if every is None else every
        scores = scorer.cross(embedded.queries, every)
        parts.append(Exact(scores, retrieval.others, retrieval.positive_bias))
    if embedded.hard is not None:
        parts.append(Exact(scorer.pairs(embedded.queries, embedded.hard), None))
    return parts


def _moved(weights: Weights, scorer: Scorer, queries: Array, fresh: Array, stale: Array) -> Array:
    """Return what a drawn row's score has gained since it was written, in the weights' shape."""
    if weights.own is None:
        return scorer.cross(queries, fresh) - scorer.cross(queries, stale)
    shape: Any = (-1, weights.own.shape[1], stale.shape[1])
    rows = (scorer.xp.reshape(each, shape) for each in (fresh, stale))
    now, then = (scorer.pairs(queries, each) for each in rows)
    return now - then
