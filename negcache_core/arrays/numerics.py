"""The few numerically careful functions that everything else is built from."""

from collections.abc import Callable
from typing import Any

from negcache_core.arrays._array import Array, ArrayT, namespace


def log_sum_exp(scores: ArrayT, axis: int = -1, *, xp: Any = None) -> ArrayT:
    """Return log(sum(exp(scores))) along an axis; -inf for no terms, and where all are -inf.

    The largest term is subtracted first, so the result is finite for any finite scores.

    >>> import numpy as np
    >>> log_sum_exp(np.asarray([[1e4, 1e4], [-np.inf, -np.inf]])).tolist()
    [10000.69314718056, -inf]
    """
    xp = xp or namespace(scores)
    if scores.shape[axis] == 0:  # some libraries have no maximum of an empty array
        return xp.sum(scores, axis=axis) - float("inf")
    top = xp.max(scores, axis=axis, keepdims=True)
    top = xp.where(xp.abs(top) < float("inf"), top, 0.0)
    total = xp.sum(xp.exp(scores - top), axis=axis)
    top = xp.sum(top, axis=axis)  # drops the axis of size 1; other sizes may be unknown
    # A sum of 0 is log 0 without a division warning; a sum of NaN stays NaN.
    return xp.where(total == 0, -float("inf"), xp.log(xp.where(total == 0, 1.0, total)) + top)


def read_out(
    scores: Array,
    rows: Array,
    factors: Array | None = None,
    *,
    product: Callable[[Any, Any], Any],
    xp: Any,
) -> tuple[Array, Array]:
    """Return the log-sum-exp (B,) of scores (n, B), and the mean (B, D) of rows by their softmax.

    factors: (n,) multiply the rows, or None
    product: (weights (B, n), rows) -> their product (B, D)

    This is attention in which keys and values are the same.
    """
    top = xp.max(scores, axis=0)
    top = xp.where(top > -float("inf"), top, 0.0)
    weights = xp.exp(scores - top[None, :])
    total = xp.sum(weights, axis=0)
    some = xp.where(total > 0, total, 1.0)
    added = xp.where(total > 0, xp.log(some) + top, -float("inf"))
    if factors is not None:
        weights = weights * factors[:, None]
    return added, product(xp.matrix_transpose(weights), rows) / some[:, None]


def block_log_sum_exp_in_place(
    scores: Any, block: int, rows: Any = None, factors: Any = None, *, xp: Any
) -> Any:
    """Return the log-sum-exp of every `block` rows of scores (n, B): (n / block, B).

    For libraries that write into their arrays (`out=`): overwrites `scores`, and allocates little.
    FOLD rows are treated as one, so that even few queries make rows as wide as registers.

    rows: (m, D), m <= n: then also returns the log-sum-exp of all rows (B,), and their mean (B, D)
          under each query's softmax, 0 for no rows. One set of exponentials serves all three, so
          this costs little more than a second product.
    factors: (m,) multiply these rows, or None
    """
    blocks, queries = scores.shape[0] // block, scores.shape[1]
    narrow, finite = (blocks, FOLD, queries), xp.finfo(scores.dtype)
    one = (blocks, 1, FOLD * queries)
    wide = xp.reshape(scores, (blocks, block // FOLD, FOLD * queries))
    top = xp.max(xp.reshape(xp.max(wide, axis=1), narrow), axis=1)
    top = xp.clip(top, finite.min, finite.max)
    xp.exp_difference(wide, xp.reshape(xp.broadcast_to(top[:, None, :], narrow), one))
    total = xp.sum(xp.reshape(xp.sum(wide, axis=1), narrow), axis=1)
    weights = xp.log(total) + top
    if rows is None:
        return weights
    highest = xp.max(top, axis=0)
    share = xp.exp(top - highest[None, :])  # a block's share of all exponentials
    whole = xp.sum(share * total, axis=0)
    share = (share / xp.where(whole > 0, whole, 1.0))[:, None, :]
    xp.multiply(wide, xp.reshape(xp.broadcast_to(share, narrow), one), out=wide)
    scores = scores[: rows.shape[0]]
    if factors is not None:
        xp.multiply(scores, factors[:, None], out=scores)
    mean = xp.matmul(xp.matrix_transpose(scores), rows)
    return weights, xp.log(whole) + highest, mean


FOLD = 8


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
    """Return the mean of `values` where `mask` is True; 0 if it is True nowhere."""
    weight = xp.astype(mask, values.dtype)
    return xp.sum(xp.where(mask, values, 0.0)) / xp.maximum(xp.sum(weight), 1.0)


def mean(values: Array, *, xp: Any = None) -> Array:
    """Return the mean; 0, not NaN, of no values.

    >>> import numpy as np
    >>> float(mean(np.asarray([1.0, 2.0]))), float(mean(np.zeros(0)))
    (1.5, 0.0)
    """
    xp = xp or namespace(values)
    count = xp.sum(xp.ones_like(values, dtype=values.dtype))
    return xp.sum(values) / xp.maximum(count, 1.0)


def finite_rows(rows: Array, *, xp: Any) -> Array:
    """Return bool (n,): True where a row of (n, D) is all finite; (n, m) for (n, m, D)."""
    return xp.all(xp.isfinite(rows), axis=-1)
