"""Metrics of a step: scalars that show whether the cache is healthy."""

from collections.abc import Sequence
from typing import Any

from negcache_core.arrays._array import Array, cast
from negcache_core.arrays.numerics import masked_mean, mean
from negcache_core.losses.estimators import Weights
from negcache_core.retrieval.result import Retrieval


def staleness(stale: Array, fresh: Array, *, xp: Any) -> Array:
    """Return |stale - fresh|^2 / |fresh|^2 by row, for (n, D) each; 0 where both are zero.

    Source: the published `_get_staleness`, which divides by zero for a zero embedding.
    """
    error = xp.sum((stale - fresh) ** 2, axis=-1)
    norm = xp.sum(fresh**2, axis=-1)
    return error / xp.where(norm > 0, norm, xp.where(error > 0, error, 1.0))


def weight_sums(weights: Weights, fresh: Array, *, xp: Any) -> tuple[Array, ...]:
    """Return sums (B,) over the drawn rows, fresh (n, D), for `weight_metrics`.

    The sums of the weights w_k and of their squares; unless each query has one draw, also of
    w_k^2 |f_k|^2 and of w_k^2 <f_k, p>, and |p|^2, with p the sum of w_k f_k.
    """
    each: Any = weights.each()
    total, square = xp.sum(each, axis=1), xp.sum(each**2, axis=1)
    if weights.own is not None and weights.own.shape[1] == 1:
        return total, square
    if weights.own is not None:
        rows = xp.reshape(fresh, (-1, each.shape[1], fresh.shape[1]))
        pulled = xp.sum(each[:, :, None] * rows, axis=1)
        squares = xp.sum(each**2 * xp.sum(rows**2, axis=2), axis=1)
        along = xp.sum(each**2 * xp.sum(rows * pulled[:, None, :], axis=2), axis=1)
    else:
        rows = xp.where(xp.any(each > 0, axis=0)[:, None], fresh, 0.0)
        pulled = xp.matmul(each, rows)
        squares = xp.sum(each**2 * xp.sum(rows**2, axis=1)[None, :], axis=1)
        along = xp.sum(each**2 * xp.matmul_transposed(pulled, rows), axis=1)
    return total, square, squares, along, xp.sum(pulled**2, axis=1)


def weight_metrics(sums: Sequence[Array], *, xp: Any) -> dict[str, Array]:
    """Return what the weights of the drawn rows say about the estimate, from `weight_sums`.

    mean_weight:     mean probability mass that the drawn rows represent
    effective_draws: (sum of a query's weights)^2 / (sum of their squares): how many rows the
                     estimate is spread over
    gradient_noise:  estimated variance of the drawn rows' part of a query's gradient, over its
                     squared length; left out if each query has one draw, which has no variance
    """
    total, square, *more = sums
    some = total > 0
    safe = xp.where(some, total, 1.0)
    metrics = {
        "mean_weight": mean(total, xp=xp),
        "effective_draws": masked_mean(
            safe**2 / xp.where(some, square, 1.0), some & (square > 0), xp=xp
        ),
    }
    if not more:
        return metrics
    squares, along, length = more
    # sum_k w_k^2 |f_k - mu|^2 with mu the weighted mean of the rows
    noise = squares - 2.0 * along / safe + square * length / safe**2
    top = mean(length, xp=xp)
    metrics["gradient_noise"] = mean(noise, xp=xp) / xp.where(top > 0, top, 1.0)
    return metrics


def step_metrics(
    retrieval: Retrieval,
    interpretable_loss: Array,
    miss: Array,
    usable: Array,
    row_staleness: Array,
    nonfinite: Array,
    *,
    xp: Any,
) -> dict[str, Array]:
    """Return the scalars that a training loop should log.

    interpretable_loss:   mean cross-entropy estimate, in nats, over the queries that have one
    positive_probability: mean p+ of the softmax over the positive and the cache, over the same
    effective_negatives:  exp of the mean entropy of the draw: how many slots compete
    fill:                 share of slots that hold a row
    mean_age_drawn:       mean age of the drawn rows, in update steps
    staleness:            mean |stale - fresh|^2 / |fresh|^2 of the drawn rows
    window:               with max_staleness, the age in steps up to which rows compete
    masked_count:         draws without a usable slot, which got weight 0
    nonfinite_count:      positives, drawn rows and hard negatives left out, of the cache and of
                          other queries' losses, for a NaN or an infinity
    """
    dtype = miss.dtype
    drawn = xp.reshape(retrieval.drawn, (-1,))
    metrics = {
        "interpretable_loss": masked_mean(interpretable_loss, usable, xp=xp),
        "positive_probability": masked_mean(1.0 - miss, usable, xp=xp),
        "effective_negatives": xp.exp(
            masked_mean(cast(retrieval.entropy, dtype, xp), xp.any(retrieval.drawn, axis=1), xp=xp)
        ),
        "fill": cast(retrieval.fill, dtype, xp),
        "mean_age_drawn": masked_mean(cast(retrieval.ages, dtype, xp), drawn, xp=xp),
        "staleness": masked_mean(row_staleness, drawn, xp=xp),
        "masked_count": xp.sum(cast(~drawn, dtype, xp)),
        "nonfinite_count": xp.sum(cast(nonfinite, dtype, xp)),
    }
    if retrieval.window is not None:
        metrics["window"] = xp.astype(retrieval.window, dtype)
    return metrics
