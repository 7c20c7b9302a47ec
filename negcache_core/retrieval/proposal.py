"""All rows that a step drew, together: what estimators need that share them among queries."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from negcache_core.arrays._array import Array
from negcache_core.arrays.exclusion import Labels
from negcache_core.arrays.numerics import log_sum_exp
from negcache_core.retrieval.tiled_scores import CacheScores
from negcache_core.retrieval.top_k import group_of


class Pool(NamedTuple):
    """The n rows that all queries drew: constants.

    stale:        (n, D) embeddings as the cache holds them
    cross_scores: (B, n) stale score of each query with each row, -inf where the row is none of its
                  negatives, or was not drawn
    log_proposal: (n,) log of how often a row is drawn in a step, the sum of all queries' proposal
                  distributions times S; 0 for a row that nobody can draw
    """

    stale: Array
    cross_scores: Array
    log_proposal: Array


def log_proposals(cross_scores: Array, log_partition: Array, *, xp: Any) -> Array:
    """Return (n,): the log of the sum of the queries' proposals for each of n drawn rows.

    A query without a usable slot drew nothing; nor did one that is not finite, and it must not
    reach the others.
    """
    drew = xp.isfinite(log_partition)
    log_proposal = cross_scores - xp.where(drew, log_partition, 0.0)[:, None]
    return log_sum_exp(xp.where(drew[:, None], log_proposal, -float("inf")), 0, xp=xp)


def pool_of(
    cross_scores: Array,
    log_partition: Array,
    stale: Array,
    draws: int,
    *,
    xp: Any,
    sum_logs: Callable[[Array], Array] = lambda logs: logs,
) -> Pool:
    """Return the pool of rows (n, D), of which each query drew `draws`.

    sum_logs: adds up, as logarithms (n,), what other replicas' queries contribute
    """
    logs = sum_logs(log_proposals(cross_scores, log_partition, xp=xp))
    known = logs > -float("inf")
    return Pool(stale, cross_scores, xp.where(known, logs + math.log(draws), 0.0))


def cross_scores(
    scores_of: CacheScores,
    stale: Array,
    labels: Labels,
    bias: Array | None,
    drawn: Array,
    slots: Array | None,
    candidates: Array | None,
    capacity: int,
) -> Array:
    """Return (B, n): the stale score of each query with each drawn row, -inf if not a negative.

    scores_of:       the scores of the queries (B, D), of any cache
    stale, labels, bias: (n, D), (n,), (n,) of the drawn rows; drawn: bool (n,), False where nothing
                     could be drawn
    slots:           (n,) of all `capacity` slots, with `candidates` (B, k), the best slot of each
                     group, where a query competes with these only
    """
    xp, backend = scores_of.scorer.xp, scores_of.backend
    scores = scores_of.scorer.by_item(scores_of.queries, stale)
    if scores_of.own is not None:
        scores = backend.exclude(scores, labels, scores_of.own)
    if bias is not None:
        scores = scores - bias[:, None]
    if candidates is not None and slots is not None:
        group = group_of(slots, capacity, candidates.shape[1], xp)
        best = xp.take_rows(xp.matrix_transpose(candidates), group)
        scores = xp.where(best == slots[:, None], scores, -float("inf"))
    return xp.matrix_transpose(xp.where(drawn[:, None], scores, -float("inf")))
