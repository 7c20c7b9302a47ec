"""Scores, and the few numerically careful functions of them that the losses need."""

from collections.abc import Callable
from typing import Any, NamedTuple

from negcache_core._array import Array, cast, matmul_transposed, namespace, positions


class Scorer(NamedTuple):
    """score(q, d) = transform(scale * <q, d>), computed in `dtype`.

    scale:     None, a number, or a function returning one or an array of one value, perhaps trained
    transform: None, or an elementwise function of scores, which may hold trained values; it
               returns the same shape and dtype
    dtype:     the dtype to compute in; half types are raised to float32 before the product
    """

    scale: Any
    transform: Callable[[Array], Array] | None
    dtype: Any
    xp: Any

    def pairs(self, queries: Array, items: Array) -> Array:
        """Score each query (B, D) with its own items (B, D) or (B, S, D): (B,) or (B, S)."""
        queries = cast(queries, self.dtype, self.xp)
        if len(items.shape) == 3:
            queries = queries[:, None, :]
        products = self.xp.sum(queries * cast(items, self.dtype, self.xp), axis=-1)
        return self._transformed(products if self.scale is None else products * self._scale())

    def by_row(self, scaled_queries: Array, items: Array) -> Array:
        """Score each query (B, D), with the scale in it, with its own items (B, n, D): (B, n)."""
        items = cast(items, self.dtype, self.xp)
        return self._transformed(self.xp.matmul(items, scaled_queries[:, :, None])[:, :, 0])

    def by_item(self, scaled_queries: Array, items: Array) -> Array:
        """Score items (C, D) with queries (B, D) that have the scale in them: (C, B)."""
        items = cast(items, self.dtype, self.xp)
        scores = matmul_transposed(items, scaled_queries, self.xp)
        if self.transform is None:
            return scores
        # The user's function sees (B, C), whichever way it is computed.
        return self.xp.matrix_transpose(self._transformed(self.xp.matrix_transpose(scores)))

    def cross(self, queries: Array, items: Array) -> Array:
        """Score every query (B, D) with every item (n, D): (B, n)."""
        return self.xp.matrix_transpose(self.by_item(self.scaled(queries), items))

    def scaled(self, queries: Array) -> Array:
        """Return queries (B, D) times the scale."""
        queries = cast(queries, self.dtype, self.xp)
        return queries if self.scale is None else queries * self._scale()

    def _transformed(self, scores: Array) -> Array:
        if self.transform is None:
            return scores
        return self.transform(scores)

    def _scale(self) -> Any:
        scale = self.scale() if callable(self.scale) else self.scale
        if isinstance(scale, (int, float)):
            return scale
        return cast(self.xp.reshape(scale, ()), self.dtype, self.xp)


def log_sum_exp(scores: Array, axis: int = -1, *, xp: Any = None) -> Array:
    """Return log(sum(exp(scores))) along an axis; -inf for no terms, and where all are -inf.

    The largest term is taken out first, so it is finite for any finite scores.

    >>> import numpy as np
    >>> log_sum_exp(np.asarray([[1e4, 1e4], [-np.inf, -np.inf]])).tolist()
    [10000.69314718056, -inf]
    """
    xp = namespace(scores, xp=xp)
    if scores.shape[axis] == 0:  # some libraries know no largest of nothing
        return xp.sum(scores, axis=axis) - float("inf")
    top = xp.max(scores, axis=axis, keepdims=True)
    top = xp.where(xp.abs(top) < float("inf"), top, 0.0)
    total = xp.sum(xp.exp(scores - top), axis=axis)
    top = xp.sum(top, axis=axis)  # drops the axis, of size 1, where other sizes may be unknown
    # A sum of 0 is log 0 without a division warning; a sum of NaN stays NaN.
    return xp.where(total == 0, -float("inf"), xp.log(xp.where(total == 0, 1.0, total)) + top)


def block_log_sum_exp_in_place(scores: Array, block: int, *, xp: Any) -> Array:
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


def exclude_in_place(scores: Array, ids: Array, positive_ids: Array, *, xp: Any) -> Array:
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
    xp = namespace(values, xp=xp)
    return xp.maximum(values, xp.zeros_like(values)) + xp.log1p(xp.exp(-xp.abs(values)))


def sigmoid(values: Array, *, xp: Any = None) -> Array:
    """Return 1 / (1 + exp(-values)) without overflow, accurate in both tails."""
    xp = namespace(values, xp=xp)
    small = xp.exp(-xp.abs(values))
    return xp.where(values >= 0, 1.0, small) / (1.0 + small)
