"""The loss of each query from fresh embeddings: a value from stale scores, and the gradient."""

from typing import Any, NamedTuple

from negcache_core.arrays._array import Array, cast
from negcache_core.arrays.backend import Backend
from negcache_core.arrays.exclusion import Exclusions, Labels
from negcache_core.arrays.numerics import finite_rows, sigmoid, soft_plus
from negcache_core.cache.window import drift_sums
from negcache_core.losses.estimators import Estimator, SampledSoftmax, Weights, corrected
from negcache_core.losses.metrics import staleness, step_metrics, weight_metrics
from negcache_core.losses.nonfinite import Embedded, Usable, of_usable_queries, without_poison
from negcache_core.losses.surrogate import (
    FullNegatives,
    cache_term,
    full_terms,
    log_partition_of,
    positive_weight,
)
from negcache_core.retrieval.result import Retrieval
from negcache_core.retrieval.scorer import Scorer


class Estimate(NamedTuple):
    """What a step estimates, by query or by drawn row; only `training` is differentiable.

    training:      (B,) the surrogate
    interpretable: (B,) the cross-entropy, in nats; both are NaN, without a gradient, where the
                   query or its positive is not finite
    fresh:         (n, D) the drawn rows' embeddings in the cache's dtype; finite: bool (n,)
    staleness:     (B,) mean of a query's drawn rows
    metrics:       scalars, see `step_metrics` and `weight_metrics`
    drift:         (5,) what the drawn rows tell a window, None where there is none
    """

    training: Array
    interpretable: Array
    fresh: Array
    finite: Array
    staleness: Array
    metrics: dict[str, Array]
    drift: Array | None


def estimate(
    embedded: Embedded,
    retrieval: Retrieval,
    scorer: Scorer,
    backend: Backend,
    *,
    estimator: Estimator,
    staleness_correction: bool,
    hard_labels: Labels | None = None,
    margin: float | None = None,
) -> Estimate:
    """Return the estimate of one step; see `CacheClassificationLoss.loss_from_negatives`.

    hard_labels: (B, H), None where hard negatives are not told apart
    """
    xp, constant = backend.xp, backend.stop_gradient
    given, stored = embedded, retrieval.stale_embeddings
    embedded, usable = without_poison(given, stored, scorer, backend)
    queries, weighed = embedded.queries, embedded.pool()
    known = of_usable_queries(retrieval, usable.queries, xp=xp)
    stale = stored if known.pool is None else known.pool.stale
    positive = scorer.pairs(queries, embedded.positives)
    ceiling = None if margin is None else positive + margin
    parts = _full_negatives(embedded, retrieval, usable, scorer, hard_labels, ceiling)
    softmax = SampledSoftmax(
        constant(positive),
        cast(known.log_partition, scorer.dtype, xp),
        known.drawn,
        log_partition_of(parts, constant, xp),
        known.pool,
    )
    log_odds = softmax.log_odds(xp=xp)
    interpretable = xp.where(usable.queries, soft_plus(log_odds, xp=xp), float("nan"))
    weights = estimator.weigh(softmax, xp=xp).without(~usable.pool, xp=xp)
    if staleness_correction:
        with backend.no_gradient():
            moved = _moved(weights, scorer, constant(queries), constant(weighed), stale)
            softmax, weights = corrected(softmax, weights, constant(moved), xp=xp)
    training = cache_term(
        weights, scorer, queries, weighed, readout=known.readout, stale=stale, constant=constant
    )
    training = training - positive_weight(softmax, weights, xp=xp) * positive
    if parts:
        training = training + full_terms(parts, softmax, constant, xp)

    with backend.no_gradient():
        was_drawn = xp.reshape(retrieval.drawn, (-1,))
        clean = constant(embedded.drawn)
        row_staleness = staleness(cast(stored, scorer.dtype, xp), clean, xp=xp)
        counted = was_drawn & usable.drawn
        row_staleness = xp.where(counted, row_staleness, 0.0)
        drift = None
        if retrieval.window is not None:
            drift = drift_sums(retrieval.ages, row_staleness, counted, xp)
        kept = finite_rows(cast(constant(given.positives), stored.dtype, xp), xp=xp)
        left_out = [was_drawn & ~usable.drawn, ~kept]
        if usable.hard is not None:
            left_out.append(xp.reshape(~usable.hard, (-1,)))
        metrics = step_metrics(
            retrieval,
            interpretable,
            sigmoid(log_odds, xp=xp),
            usable.queries,
            row_staleness,
            xp.concat(left_out),
            xp=xp,
        )
        metrics.update(weight_metrics(weights, constant(weighed), xp=xp))
        by_query = xp.reshape(row_staleness, (-1, retrieval.drawn.shape[1]))
        fresh = cast(constant(given.drawn), stored.dtype, xp)
    return Estimate(
        xp.where(usable.queries, training, float("nan")),
        interpretable,
        fresh,
        usable.drawn,
        xp.mean(by_query, axis=1),
        metrics,
        drift,
    )


def _full_negatives(
    embedded: Embedded,
    retrieval: Retrieval,
    usable: Usable,
    scorer: Scorer,
    hard_labels: Labels | None,
    ceiling: Array | None,
) -> list[FullNegatives]:
    """Return what competes in full: in-batch positives and hard negatives, where there are such."""
    parts, own = [], Exclusions(ceiling=ceiling)
    if retrieval.others is not None:  # told apart by their labels already
        scores = scorer.cross(embedded.queries, embedded.batch())
        counts = retrieval.others & usable.batch[None, :]
        counts = _counting(counts, own, Labels(), scores)
        parts.append(FullNegatives(scores, counts, retrieval.positive_bias))
    if embedded.hard is not None:
        scores = scorer.pairs(embedded.queries, embedded.hard)
        if hard_labels is not None and retrieval.own is not None:
            own = retrieval.own._replace(ceiling=ceiling)
        counts = _counting(usable.hard, own, hard_labels or Labels(), scores)
        parts.append(FullNegatives(scores, counts))
    return parts


def _counting(counts: Any, own: Exclusions, labels: Labels, scores: Array) -> Any:
    admitted = own.admit(labels, scores)
    return counts if admitted is None else counts & admitted


def _moved(weights: Weights, scorer: Scorer, queries: Array, fresh: Array, stale: Array) -> Array:
    """Return what a drawn row's score has gained since it was written, in the weights' shape."""
    if weights.own is None:
        return scorer.cross(queries, fresh) - scorer.cross(queries, stale)
    shape: Any = (-1, weights.own.shape[1], stale.shape[1])
    rows = (scorer.xp.reshape(each, shape) for each in (fresh, stale))
    now, then = (scorer.pairs(queries, each) for each in rows)
    return now - then
