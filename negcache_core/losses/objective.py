"""The loss of each query from fresh embeddings: its value from stale scores, and its gradient."""

from typing import NamedTuple

from negcache_core.arrays._array import Array, cast
from negcache_core.arrays.backend import Backend
from negcache_core.arrays.exclusion import Labels
from negcache_core.arrays.numerics import finite_rows, sigmoid
from negcache_core.cache.window import drift_sums
from negcache_core.losses.by_query import Step, by_query
from negcache_core.losses.estimators import Estimator
from negcache_core.losses.metrics import staleness, step_metrics, weight_metrics
from negcache_core.losses.nonfinite import Embedded, without_poison
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
    drift:         (5,) what a window learns from the drawn rows, None without a window
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
    tile_bytes: int | None = None,
) -> Estimate:
    """Return the estimate of one step; see `CacheClassificationLoss.loss_from_negatives`.

    hard_labels: (B, H), None if hard negatives have no labels
    tile_bytes:  memory for scores in flight; None for what suits the device
    """
    xp, constant = backend.xp, backend.stop_gradient
    given, stored = embedded, retrieval.stale_embeddings
    embedded, usable = without_poison(given, stored, scorer, backend)
    found = by_query(
        Step(
            embedded,
            usable,
            retrieval,
            scorer,
            backend,
            estimator,
            staleness_correction,
            hard_labels,
            margin,
        ),
        tile_bytes,
    )
    with backend.no_gradient():
        log_odds = found.log_odds
        interpretable = xp.where(usable.queries, found.loss, float("nan"))
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
        metrics.update(weight_metrics(found.sums, xp=xp))
        by_draw = xp.reshape(row_staleness, (-1, retrieval.drawn.shape[1]))
        fresh = cast(constant(given.drawn), stored.dtype, xp)
    return Estimate(
        xp.where(usable.queries, found.training, float("nan")),
        interpretable,
        fresh,
        usable.drawn,
        xp.mean(by_draw, axis=1),
        metrics,
        drift,
    )
