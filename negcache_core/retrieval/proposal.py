"""All rows that a step drew, together, for estimators that share them among queries."""

import math
from typing import Any, NamedTuple

from negcache_core.arrays._array import Array, arange_like, cast, mask_rows
from negcache_core.arrays.backend import Backend
from negcache_core.arrays.exclusion import Exclusions, Labels
from negcache_core.arrays.numerics import log_sum_exp
from negcache_core.retrieval import prefixes as matryoshka
from negcache_core.retrieval.prefix_scores import at_width
from negcache_core.retrieval.scorer import Scorer


class CrossScores(NamedTuple):
    """The stale scores of B queries with n drawn rows, computed on demand.

    They are -inf where a row is not one of the query's negatives, or was not drawn.

    queries:    (B, D), with the scale in them
    own:        what must not be a negative of each query, or None for nothing
    drawn:      bool (n,), False where nothing could be drawn
    labels:     (n,) of the rows
    bias:       (n,) subtracted from their scores, or None
    candidates: (B, k), the best slot of each top-k group, if queries compete only with these;
                then slots and groups: (n,) of the rows
    """

    queries: Array
    own: Exclusions | None
    drawn: Array
    labels: Labels
    bias: Array | None
    candidates: Array | None
    slots: Array | None
    groups: Array | None

    def of_queries(self, rows: Array, xp: Any) -> "CrossScores":
        """Return the scores of some of the queries, by their rows (n,)."""
        best = self.candidates
        return self._replace(
            queries=xp.take_rows(self.queries, rows),
            own=None if self.own is None else self.own.of_queries(rows, xp),
            candidates=None if best is None else xp.take_rows(best, rows),
        )

    def matrix(self, stale: Array, scorer: Scorer, backend: Backend) -> Array:
        """Return the scores with rows (n, D), as the cache holds them: (B, n), constants.

        With prefixes, for each width: (B, W, n).
        """
        xp, none = backend.xp, -float("inf")
        if scorer.prefixes is not None:
            return self._by_width(stale, scorer, scorer.prefixes, backend)
        scores = scorer.by_item(self.queries, stale)
        if self.own is not None:
            scores = backend.exclude(scores, self.labels, self.own)
        if self.bias is not None:
            scores = scores - self.bias[:, None]
        if self.candidates is not None and self.slots is not None:
            best = xp.take_rows(xp.matrix_transpose(self.candidates), self.groups)
            scores = xp.where(best == self.slots[:, None], scores, none)
        return xp.matrix_transpose(xp.where(self.drawn[:, None], scores, none))

    def _by_width(
        self, stale: Array, scorer: Scorer, prefixes: matryoshka.Prefixes, backend: Backend
    ) -> Array:
        xp, found = backend.xp, []
        rows = cast(stale, scorer.dtype, xp)
        every = matryoshka.by_item(self.queries, rows, prefixes, xp)
        for place, each in enumerate(every):
            scores: Any = each
            if self.own is not None:
                scores = backend.exclude(scores, self.labels, at_width(self.own, place))
            if self.bias is not None:
                scores = scores - self.bias[:, None]
            scores = xp.where(self.drawn[:, None], scores, -float("inf"))
            found.append(xp.matrix_transpose(scores))
        joined: Array = matryoshka.beside(found, xp)
        return joined


class Pool(NamedTuple):
    """The n rows that all queries drew: constants.

    stale:        (n, D) embeddings as the cache holds them
    cross_scores: (B, n) stale score of each query with each row, -inf where the row is not one of
                  its negatives, or was not drawn; with prefixes (B, W, n), for each width; or an
                  object that computes these, if they are many
    log_proposal: (n,) log of how often a row is drawn in a step, the sum of all queries' proposal
                  distributions times S; 0 for a row that nobody can draw
    """

    stale: Array
    cross_scores: Any
    log_proposal: Array

    def of_queries(self, rows: Array, xp: Any) -> "Pool":
        """Return the pool as seen by some of the queries, by their rows (n,)."""
        scores = self.cross_scores
        if isinstance(scores, CrossScores):
            return self._replace(cross_scores=scores.of_queries(rows, xp))
        return self._replace(cross_scores=xp.take_rows(scores, rows))

    def computed(self, scorer: Scorer, backend: Backend) -> "Pool":
        """Return the pool with its cross scores as an array."""
        scores = self.cross_scores
        if isinstance(scores, CrossScores):
            with backend.no_gradient():
                scores = backend.stop_gradient(scores.matrix(self.stale, scorer, backend))
        return self._replace(cross_scores=scores)


def pool_of(stale: Array, cross_scores: Any, logs: Array, draws: int, *, xp: Any) -> Pool:
    """Return the pool of rows; each query drew `draws` of them. logs: (n,) `log_proposals`."""
    return Pool(stale, cross_scores, xp.where(logs > -float("inf"), logs + math.log(draws), 0.0))


def log_proposals(cross_scores: Array, log_partition: Array, *, xp: Any) -> Array:
    """Return (n,): the log of the sum of the queries' proposals for each of n drawn rows.

    A query without a usable slot drew nothing; neither did one that is not finite, and it must not
    affect the others. With prefixes cross_scores are (B, W, n), and log_partition is replaced by
    what `of_mixture` makes of it, (B, W).
    """
    if len(cross_scores.shape) == 3:
        cross_scores = matryoshka.by_query_and_width(cross_scores, xp)
        log_partition = xp.reshape(log_partition, (-1,))
    drew = xp.isfinite(log_partition)
    log_proposal = cross_scores - xp.where(drew, log_partition, 0.0)[:, None]
    return log_sum_exp(xp.where(drew[:, None], log_proposal, -float("inf")), 0, xp=xp)


def log_proposals_by_chunk(
    cross_scores: CrossScores,
    log_partition: Array,
    stale: Array,
    size: int,
    scorer: Scorer,
    backend: Backend,
) -> Array:
    """Return what `log_proposals` does, from the scores of `size` queries at a time."""
    xp, rows = backend.xp, log_partition.shape[0]

    def of_chunk(chunk: Any) -> tuple[Array, ...]:
        place = chunk * size + arange_like(size, log_partition, xp)
        there = place < rows
        place = xp.where(there, place, 0)
        scores = cross_scores.of_queries(place, xp).matrix(stale, scorer, backend)
        partition = xp.take_rows(log_partition, place)
        partition = xp.where(mask_rows(there, partition), partition, -float("inf"))
        return (log_proposals(scores, partition, xp=xp)[None, :],)

    (parts,) = backend.fold_tiles(of_chunk, -(-rows // size))
    return log_sum_exp(parts, 0, xp=xp)
