"""Metrics of a step: scalars that tell whether the cache is healthy."""

from typing import Any

from negcache_core._array import Array, cast, namespace
from negcache_core.retrieval import Retrieval


def masked_mean(values: Array, mask: Array, *, xp: Any) -> Array:
    """Return the mean of `values` where `mask` is True; 0 where it is nowhere."""
    weight = cast(mask, values.dtype, xp)
    return xp.sum(xp.where(mask, values, 0.0)) / xp.maximum(xp.sum(weight), 1.0)


def staleness(stale: Array, fresh: Array, *, xp: Any) -> Array:
    """Return |stale - fresh|^2 / |fresh|^2 by row, for (n, D) each; 0 where both are zero.

    Source: the published `_get_staleness`, which divides by zero for a zero embedding.
    """
    error = xp.sum((stale - fresh) ** 2, axis=-1)
    norm = xp.sum(fresh**2, axis=-1)
    return error / xp.where(norm > 0, norm, xp.where(error > 0, error, 1.0))


def mean(values: Array, *, xp: Any = None) -> Array:
    """Return the mean; 0, not NaN, of no values.

    >>> import numpy as np
    >>> float(mean(np.asarray([1.0, 2.0]))), float(mean(np.zeros(0)))
    (1.5, 0.0)
    """
    xp = namespace(values, xp=xp)
    return masked_mean(values, xp.ones_like(values, dtype=xp.bool), xp=xp)


def finite_rows(rows: Array, *, xp: Any) -> Array:
    """Return bool (n,): True where all of a row of (n, D) is finite."""
    return xp.all(xp.isfinite(rows), axis=1)


def step_metrics(
    retrieval: Retrieval,
    interpretable_loss: Array,
    miss: Array,
    row_staleness: Array,
    nonfinite: Array,
    *,
    xp: Any,
) -> dict[str, Array]:
    """Return the scalars that a training loop should log.

    interpretable_loss:   mean cross-entropy estimate, in nats
    positive_probability: mean p+ of the softmax over the positive and the cache
    effective_negatives:  exp of the mean entropy of the draw: how many slots compete
    fill:                 share of slots that hold a row
    mean_age_drawn:       mean age of the drawn rows, in update steps
    staleness:            mean |stale - fresh|^2 / |fresh|^2 of the drawn rows
    masked_count:         draws without a usable slot, which got weight 0
    nonfinite_count:      embeddings kept out of the cache for a NaN or an infinity
    """
    dtype = miss.dtype
    drawn = xp.reshape(retrieval.drawn, (-1,))
    return {
        "interpretable_loss": mean(interpretable_loss, xp=xp),
        "positive_probability": mean(1.0 - miss, xp=xp),
        "effective_negatives": xp.exp(
            masked_mean(cast(retrieval.entropy, dtype, xp), xp.any(retrieval.drawn, axis=1), xp=xp)
        ),
        "fill": cast(retrieval.fill, dtype, xp),
        "mean_age_drawn": masked_mean(cast(retrieval.ages, dtype, xp), drawn, xp=xp),
        "staleness": masked_mean(row_staleness, drawn, xp=xp),
        "masked_count": xp.sum(cast(~drawn, dtype, xp)),
        "nonfinite_count": xp.sum(cast(nonfinite, dtype, xp)),
    }
