"""The few numerically careful functions that everything else is built from."""

from typing import Any

from negcache_core.arrays._array import Array, ArrayT, cast, namespace, positions


def log_sum_exp(scores: ArrayT, axis: int = -1, *, xp: Any = None) -> ArrayT:
    """Return log(sum(exp(scores))) along an axis; -inf for no terms, and where all are -inf.

    The largest term is taken out first, so it is finite for any finite scores.

    >>> import numpy as np
    >>> log_sum_exp(np.asarray([[1e4, 1e4], [-np.inf, -np.inf]])).tolist()
    [10000.69314718056, -inf]
    """
    xp = xp or namespace(scores)
    if scores.shape[axis] == 0:  # some libraries know no largest of nothing
        return xp.sum(scores, axis=axis) - float("inf")
    top = xp.max(scores, axis=axis, keepdims=True)
    top = xp.where(xp.abs(top) < float("inf"), top, 0.0)
    total = xp.sum(xp.exp(scores - top), axis=axis)
    top = xp.sum(top, axis=axis)  # drops the axis, of size 1, where other sizes may be unknown
    # A sum of 0 is log 0 without a division warning; a sum of NaN stays NaN.
    return xp.where(total == 0, -float("inf"), xp.log(xp.where(total == 0, 1.0, total)) + top)


def block_log_sum_exp_in_place(scores: ArrayT, block: int, *, xp: Any) -> ArrayT:
    """Return the log-sum-exp of every `block` rows of scores (n, B): (n / block, B).

    For libraries that write into their arrays (`out=`): overwrites `scores`, and allocates little.
    Each FOLD rows are treated as one, so that few queries still make rows as wide as registers.
    """
    blocks, rows = scores.shape[0] // block, scores.shape[1]
    narrow, finite = (blocks, FOLD, rows), xp.finfo(scores.dtype)
    wide = xp.reshape(scores, (blocks, block // FOLD, FOLD * rows))
    top = xp.max(xp.reshape(xp.max(wide, axis=1), narrow), axis=1)
    top = xp.clip(top, finite.min, finite.max)[:, None, :]
    shift = xp.reshape(xp.broadcast_to(top, narrow), (blocks, 1, FOLD * rows))
    xp.exp(xp.subtract(wide, shift, out=wide), out=wide)
    total = xp.sum(xp.reshape(xp.sum(wide, axis=1), narrow), axis=1)
    return xp.log(total) + top[:, 0]


FOLD = 8


def is_among(ids: Array, positive_ids: Array) -> Array:
    """Return bool (n, B): whether each of ids (n,) is one of each query's positive_ids (B, P)."""
    found = ids[:, None] == positive_ids[None, :, 0]
    for place in range(1, positive_ids.shape[1]):  # one n x B comparison at a time
        found = found | (ids[:, None] == positive_ids[None, :, place])
    return found


def exclude_in_place(scores: ArrayT, ids: Array, positive_ids: Array, *, xp: Any) -> ArrayT:
    """Set scores (n, B) to -inf where `is_among`, for libraries that write into their arrays.

    Few rows hold a positive of any query: they are found by bisection, and only they are compared.
    """
    wanted = xp.sort(xp.reshape(positive_ids, (-1,)))
    if wanted.shape[0]:
        place = xp.clip(xp.searchsorted(wanted, ids), 0, wanted.shape[0] - 1)
        rows = positions(ids, xp)[wanted[place] == ids]
        found = is_among(ids[rows], positive_ids)
        scores[rows] = xp.where(found, -float("inf"), scores[rows])
    return scores


def soft_plus(values: Array, *, xp: Any = None) -> Array:
    """Return log(1 + exp(values)) without overflow: finite for all finite values, 0 for -inf."""
    xp = xp or namespace(values)
    return xp.maximum(values, xp.zeros_like(values)) + xp.log1p(xp.exp(-xp.abs(values)))


def sigmoid(values: Array, *, xp: Any = None) -> Array:
    """Return 1 / (1 + exp(-values)) without overflow, accurate in both tails."""
    xp = xp or namespace(values)
    small = xp.exp(-xp.abs(values))
    return xp.where(values >= 0, 1.0, small) / (1.0 + small)


def masked_mean(values: Array, mask: Array, *, xp: Any) -> Array:
    """Return the mean of `values` where `mask` is True; 0 where it is nowhere."""
    weight = cast(mask, values.dtype, xp)
    return xp.sum(xp.where(mask, values, 0.0)) / xp.maximum(xp.sum(weight), 1.0)


def mean(values: Array, *, xp: Any = None) -> Array:
    """Return the mean; 0, not NaN, of no values.

    >>> import numpy as np
    >>> float(mean(np.asarray([1.0, 2.0]))), float(mean(np.zeros(0)))
    (1.5, 0.0)
    """
    xp = xp or namespace(values)
    return masked_mean(values, xp.ones_like(values, dtype=xp.bool), xp=xp)


def finite_rows(rows: Array, *, xp: Any) -> Array:
    """Return bool (n,): True where all of a row of (n, D) is finite; (n, m) for (n, m, D)."""
    return xp.all(xp.isfinite(rows), axis=-1)
