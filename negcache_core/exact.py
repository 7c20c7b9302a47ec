"""The oracle: what the estimates should equal, computed in full. For tests and study.

Scores here are linear, scale * <q, d>; losses are means over the B queries.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from negcache_core.arrays._array import Array, namespace, positions
from negcache_core.arrays.numerics import log_sum_exp, sigmoid, soft_plus
from negcache_core.losses.estimators import Weights


class Gradients(NamedTuple):
    """Gradients of a mean loss: query (B, D), positive (B, D), items (C, D), scale ()."""

    query: Array
    positive: Array
    items: Array
    scale: Array


class ExactLoss(NamedTuple):
    """The full softmax loss.

    loss:          (B,) cross-entropy in nats
    probabilities: (B, C) of the items; positive_probability (B,); with it they sum to 1
    gradients:     of the mean loss
    """

    loss: Array
    positive_probability: Array
    probabilities: Array
    gradients: Gradients


def softmax_cross_entropy(
    query: Array,
    positive: Array,
    items: Array,
    *,
    fresh_items: Array | None = None,
    scale: Any = 1.0,
    mask: Array | None = None,
    xp: Any = None,
) -> ExactLoss:
    """Return the softmax cross-entropy of positives against themselves and all items.

    query, positive: (B, D); items: (C, D); mask: bool (C,) or (B, C), False leaves an item out
    fresh_items:     (C, D): gradients go through these, probabilities come from `items`. This is
                     the expectation that every estimator has on a stale cache (docs: estimators):
                     -(1 - p+) grad s+ + sum_j p_j grad s'_j.

    >>> import numpy as np
    >>> exact = softmax_cross_entropy(np.ones((1, 1)), np.ones((1, 1)), np.ones((3, 1)))
    >>> round(float(np.exp(exact.loss[0])), 6), round(float(exact.gradients.positive[0, 0]), 6)
    (4.0, -0.75)
    """
    xp = namespace(query, positive, items, xp=xp)
    fresh = items if fresh_items is None else fresh_items
    scores = scale * xp.matmul_transposed(query, items)
    if mask is not None:
        scores = xp.where(mask, scores, -float("inf"))
    positive_scores = scale * xp.sum(query * positive, axis=1)
    log_odds = log_sum_exp(scores, xp=xp) - positive_scores
    hit = sigmoid(-log_odds, xp=xp)
    log_partition = soft_plus(log_odds, xp=xp) + positive_scores
    probabilities = xp.exp(scores - log_partition[:, None])
    slopes = _Slopes(-sigmoid(log_odds, xp=xp), probabilities)
    return ExactLoss(
        soft_plus(log_odds, xp=xp),
        hit,
        probabilities,
        _chain(slopes, query, positive, fresh, scale, xp),
    )


class _Slopes(NamedTuple):
    """Derivatives of each query's loss by its positive's score (B,) and the items' (B, C)."""

    positive: Array
    items: Array


def _chain(
    slopes: _Slopes, query: Array, positive: Array, items: Array, scale: Any, xp: Any
) -> Gradients:
    """Carry slopes by scores back to the embeddings and the scale, for the mean over queries."""
    by_positive = slopes.positive[:, None] / query.shape[0]
    by_items = slopes.items / query.shape[0]
    pulled = by_positive * positive + xp.matmul(by_items, items)
    return Gradients(
        scale * pulled,
        scale * by_positive * query,
        scale * xp.matmul(xp.matrix_transpose(by_items), query),
        xp.sum(query * pulled),
    )


def surrogate_gradients(
    weights: Weights,
    positive_weight: Array,
    slots: Array,
    query: Array,
    positive: Array,
    items: Array,
    *,
    scale: Any = 1.0,
    xp: Any = None,
) -> Gradients:
    """Return the gradients of the training loss for one outcome of the draw, in closed form.

    positive_weight: (B,) 1 - p+; slots: (B, S), what was drawn; items: (C, D) fresh embeddings

    For libraries without automatic differentiation, and to check those that have it.
    """
    xp = namespace(query, positive, items, xp=xp)
    every = positions(items, xp)
    named = xp.astype(slots[:, :, None] == every[None, None, :], items.dtype)
    if weights.own is not None:
        by_items = xp.sum(weights.own[:, :, None] * named, axis=1)
    else:
        by_items = xp.matmul(weights.every, xp.reshape(named, (-1, items.shape[0])))
    return _chain(_Slopes(-positive_weight, by_items), query, positive, items, scale, xp)


def enumerate_draws(
    probabilities: Iterable[Iterable[Any]], num_samples: int = 1
) -> Iterator[tuple[list[list[int]], float]]:
    """Yield every outcome of the draw, slots (B, S) as lists, with its probability.

    probabilities: (B, C), the distribution of one draw for each query. There are C ** (B * S)
    outcomes; those of probability zero are left out.

    >>> import numpy as np
    >>> [(slots, round(p, 2)) for slots, p in enumerate_draws(np.asarray([[0.4, 0.6]]))]
    [([[0]], 0.4), ([[1]], 0.6)]
    """
    rows = [[float(value) for value in row] for row in probabilities]
    per_draw = [
        [(slot, p) for slot, p in enumerate(row) if p > 0]
        for row in rows
        for _ in range(num_samples)
    ]
    for outcome in itertools.product(*per_draw):
        probability = 1.0
        for _, p in outcome:
            probability *= p
        slots = [slot for slot, _ in outcome]
        yield (
            [slots[i : i + num_samples] for i in range(0, len(slots), num_samples)],
            probability,
        )


def expectation(
    outcomes: Iterator[tuple[list[list[int]], float]],
    function: Callable[[list[list[int]]], tuple[Array, ...]],
) -> tuple[Array, ...]:
    """Return the sum over outcomes of probability * function(slots), term by term."""
    total: tuple[Array, ...] | None = None
    for slots, probability in outcomes:
        terms = tuple(probability * term for term in function(slots))
        total = terms if total is None else tuple(map(_add, total, terms))
    return total or ()


def _add(left: Array, right: Array) -> Array:
    return left + right
