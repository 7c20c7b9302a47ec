"""What the networks made of a step's queries and items, and how little a bad row can affect.

An embedding that is not finite, as after an overflow, affects no other query. Zeros replace it
before anything is computed: 0 times it would be NaN, in the loss and in the backward pass.
"""

from typing import Any, NamedTuple

from negcache_core.arrays._array import Array, cast
from negcache_core.arrays.backend import Backend
from negcache_core.arrays.numerics import finite_rows
from negcache_core.retrieval.placement import Placement
from negcache_core.retrieval.result import Retrieval
from negcache_core.retrieval.scorer import Scorer


class Embedded(NamedTuple):
    """Fresh embeddings, differentiable: queries, positives (B, D); drawn (n, D); hard (B, H, D).

    every_positive, every_drawn: those of all replicas if there are several, else None
    competing: (B, m) not embeddings, but scores of further negatives, -inf for none; or None
    """

    queries: Array
    positives: Array
    drawn: Array
    hard: Array | None = None
    every_positive: Array | None = None
    every_drawn: Array | None = None
    competing: Array | None = None

    def pool(self) -> Array:
        """Return the rows that all queries drew: those of all replicas, if there are several."""
        return self.drawn if self.every_drawn is None else self.every_drawn

    def batch(self) -> Array:
        """Return the positives of all queries, those of all replicas."""
        return self.positives if self.every_positive is None else self.every_positive


def gathered(
    embedded: Embedded, retrieval: Retrieval, placement: Placement, dtype: Any, xp: Any
) -> Embedded:
    """Return the embeddings in `dtype`, with those of all replicas that a loss needs.

    They are converted once, so that the gradients from their several uses are summed in `dtype`,
    and rounded to the towers' dtype once.
    """
    draws = () if retrieval.route is None else retrieval.route.sizes
    rows = tuple([size // retrieval.drawn.shape[1] for size in draws])
    # The same order everywhere, because gradients travel back in reverse.
    if retrieval.others is not None:
        every = placement.gather_fresh(embedded.positives, rows)
        embedded = embedded._replace(every_positive=every)
    if retrieval.pool is not None:
        every = placement.gather_fresh(embedded.drawn, draws)
        embedded = embedded._replace(every_drawn=every)
    raised: list[Any] = [None if each is None else cast(each, dtype, xp) for each in embedded]
    return Embedded(*raised)


class Usable(NamedTuple):
    """Which embeddings are finite: bool, constants.

    queries: (B,) those whose positive is finite too, and that have no competing score of NaN or
             +inf; the others have no loss
    batch:   (n,) of the batch's positives as negatives
    hard:    (B, H), or None
    drawn:   (n,) in the cache's dtype, of the rows that these queries drew
    pool:    (n,) of the rows that all queries drew; `drawn` where there are no replicas
    competing: (B, m) of the competing scores, or None
    """

    queries: Array
    batch: Array
    hard: Array | None
    drawn: Array
    pool: Array
    competing: Array | None = None


def without_poison(
    embedded: Embedded, stored: Array, scorer: Scorer, backend: Backend
) -> tuple[Embedded, Usable]:
    """Return the embeddings with zeros for those that must not count, and which ones count.

    stored: (…, D) of the cache's dtype: a drawn row that is not finite in it does not count either
    """
    xp, constant = backend.xp, backend.stop_gradient

    def finite(rows: Array, dtype: Any = scorer.dtype) -> Array:
        return finite_rows(cast(constant(rows), dtype, xp), xp=xp)

    def kept(rows: Array, mask: Any) -> Array:
        return xp.where(mask[..., None], rows, 0.0)

    with backend.no_gradient():
        batch = own = finite(embedded.positives)
        if embedded.every_positive is not None:
            batch = finite(embedded.every_positive)
        queries = own & finite(embedded.queries)
        hard = None if embedded.hard is None else finite(embedded.hard)
        pool = drawn = finite(embedded.drawn, stored.dtype)
        if embedded.every_drawn is not None:
            pool = finite(embedded.every_drawn, stored.dtype)
        competing = None
        if embedded.competing is not None:
            scores = constant(embedded.competing)
            competing = xp.isfinite(scores)
            queries = queries & xp.all(competing | (scores == -float("inf")), axis=1)
    clean = Embedded(
        kept(embedded.queries, queries),
        kept(embedded.positives, own),
        kept(embedded.drawn, drawn),
        None if embedded.hard is None else kept(embedded.hard, hard),
        None if embedded.every_positive is None else kept(embedded.every_positive, batch),
        None if embedded.every_drawn is None else kept(embedded.every_drawn, pool),
        None if competing is None else xp.where(competing, embedded.competing, 0.0),
    )
    return clean, Usable(queries, batch, hard, drawn, pool, competing)


def of_usable_queries(
    retrieval: Retrieval, usable: Array, scorer: Scorer, backend: Backend
) -> Retrieval:
    """Return a retrieval in which unusable queries, by `usable` (B,), drew nothing."""
    xp, rows, pool, readout = backend.xp, usable[:, None], retrieval.pool, retrieval.readout
    if pool is not None:
        pool = pool.computed(scorer, backend)
        pool = pool._replace(cross_scores=xp.where(rows, pool.cross_scores, -float("inf")))
    return retrieval._replace(
        drawn=retrieval.drawn & rows,
        log_partition=xp.where(usable, retrieval.log_partition, -float("inf")),
        pool=pool,
        readout=None if readout is None else xp.where(rows, readout, 0.0),
    )
