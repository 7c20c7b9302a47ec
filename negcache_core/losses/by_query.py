"""What needs the whole batch for each query: for all queries at once, or a few at a time.

Queries do not share scores, so all B x B scores need not exist at once: if there are too many,
chunks of queries go one after the other, and again in the backward pass.
"""

from typing import Any, NamedTuple

from negcache_core.arrays._array import Array, arange_like, cast, positions
from negcache_core.arrays.backend import Backend
from negcache_core.arrays.budget import budget_of, rows_at_a_time
from negcache_core.arrays.exclusion import Exclusions, Labels
from negcache_core.arrays.numerics import soft_plus
from negcache_core.losses.estimators import Estimator, SampledSoftmax, Weights, corrected
from negcache_core.losses.metrics import weight_sums
from negcache_core.losses.nonfinite import Embedded, Usable, of_usable_queries
from negcache_core.losses.surrogate import (
    FullNegatives,
    cache_term,
    full_terms,
    last_width,
    log_partition_of,
    positive_weight,
    widest_term,
)
from negcache_core.retrieval.prefixes import Prefixes, at_widest, by_query_and_width
from negcache_core.retrieval.result import Retrieval
from negcache_core.retrieval.scorer import Scorer


class Step(NamedTuple):
    """What the loss of B queries is computed from: facts about them, and the loss's options.

    hard_labels: (B, H), None if hard negatives have no labels
    """

    embedded: Embedded
    usable: Usable
    retrieval: Retrieval
    scorer: Scorer
    backend: Backend
    estimator: Estimator
    staleness_correction: bool
    hard_labels: Labels | None
    margin: float | None

    def of_queries(self, rows: Array) -> "Step":
        """Return the same for some of the queries: rows (n,) of them."""
        xp, (embedded, usable, known) = self.backend.xp, self[:3]
        draws = known.drawn.shape[1]
        own_draws = rows[:, None] * draws + arange_like(draws, rows, xp)[None, :]
        own_draws = xp.reshape(own_draws, (-1,))

        def some(array: Any, rows: Array = rows) -> Any:
            return None if array is None else xp.take_rows(array, rows)

        pool, others, own, hard = known.pool, known.others, known.own, self.hard_labels
        if pool is None:  # otherwise every query needs everyone's rows
            usable = usable._replace(pool=some(usable.pool, own_draws))
            known = known._replace(stale_embeddings=some(known.stale_embeddings, own_draws))
        return self._replace(
            embedded=Embedded(
                some(embedded.queries),
                some(embedded.positives),
                some(embedded.drawn, own_draws) if pool is None else embedded.pool(),
                some(embedded.hard),
                embedded.batch(),
                competing=some(embedded.competing),
            ),
            usable=usable._replace(
                queries=some(usable.queries),
                hard=some(usable.hard),
                competing=some(usable.competing),
            ),
            retrieval=known._replace(
                drawn=some(known.drawn),
                log_partition=some(known.log_partition),
                readout=some(known.readout),
                by_width=some(known.by_width),
                pool=None if pool is None else pool.of_queries(rows, xp),
                others=None if others is None else others._replace(place=some(others.place)),
                own=None if own is None else own.of_queries(rows, xp),
            ),
            hard_labels=None if hard is None else hard.each(some),
        )

    def of_widths(self, prefixes: Prefixes) -> "Step":
        """Return the same for B * W queries, by query and width; `embedded` has B."""
        xp, (usable, known) = self.backend.xp, self[1:3]
        every = xp.reshape(known.by_width, (-1,))
        rows = positions(every, xp) // prefixes.number

        def some(array: Any) -> Any:
            return None if array is None else xp.take_rows(array, rows)

        pool: Any = known.pool
        pool = pool.computed(self.scorer, self.backend)
        cross = by_query_and_width(pool.cross_scores, xp)
        others, own, hard = known.others, known.own, self.hard_labels
        return self._replace(
            usable=usable._replace(queries=some(usable.queries), hard=some(usable.hard)),
            retrieval=known._replace(
                drawn=some(known.drawn),
                log_partition=every,
                readout=None,
                pool=pool._replace(cross_scores=cross),
                others=None if others is None else others._replace(place=some(others.place)),
                own=None if own is None else own.of_queries(rows, xp),
            ),
            hard_labels=None if hard is None else hard.each(some),
        )


class ByQuery(NamedTuple):
    """The results for each query, (B,); only `training` is differentiable.

    training: the surrogate
    loss:     the cross-entropy
    log_odds: log((1 - p+) / p+)
    sums:     of the weights, see `weight_sums`

    With prefixes the first two are sums over widths, and the others are for the last width.
    """

    training: Array
    loss: Array
    log_odds: Array
    sums: tuple[Array, ...]


def by_query(step: Step, tile_bytes: int | None) -> ByQuery:
    """Return the results for each query.

    tile_bytes: memory for scores; None for what suits the device. If all queries take more, they
                are done a few at a time, as many as fit, and again for the gradient.
    """
    backend, embedded, known = step.backend, step.embedded, step.retrieval
    xp, queries, numbers = backend.xp, embedded.queries, 0
    if known.pool is not None:
        numbers += embedded.pool().shape[0] or 0  # unknown while tracing, as are the queries then
    if known.others is not None:
        numbers += embedded.batch().shape[0] or 0
    if step.scorer.prefixes is not None:
        numbers *= step.scorer.prefixes.number
    if not numbers:
        return _at_once(step)
    budget = budget_of(tile_bytes, queries, backend)
    size = rows_at_a_time(backend.tile_rows(queries), numbers, step.scorer.dtype, budget, xp)
    if size is None:
        return _at_once(step)

    def some(rows: Array) -> Array:
        found = _at_once(step.of_queries(rows))
        columns = (found.training, found.loss, found.log_odds, *found.sums)
        return xp.concat([cast(each, step.scorer.dtype, xp)[:, None] for each in columns], axis=1)

    columns = backend.map_chunks(some, [positions(queries, xp)], size)
    constants = backend.stop_gradient(columns)
    loss, log_odds, *sums = [constants[:, place] for place in range(1, columns.shape[1])]
    return ByQuery(columns[:, 0], loss, log_odds, tuple(sums))


def _at_once(step: Step) -> ByQuery:
    backend, prefixes, weighed = step.backend, step.scorer.prefixes, step.embedded.pool()
    if prefixes is not None:
        return _at_all_widths(step, prefixes)
    training, log_odds, weights = _estimated(step)
    with backend.no_gradient():
        loss = soft_plus(log_odds, xp=backend.xp)
        sums = weight_sums(weights, backend.stop_gradient(weighed), xp=backend.xp)
        return ByQuery(training, loss, log_odds, sums)


def _at_all_widths(step: Step, prefixes: Prefixes) -> ByQuery:
    """Add up what is found at each width; a readout, if there is one, is at the last."""
    embedded, usable, retrieval, scorer, backend = step[:5]
    xp, constant, shape = backend.xp, backend.stop_gradient, (-1, prefixes.number)
    pool: Any = retrieval.pool
    queries = scorer.scaled(embedded.queries)
    step = step._replace(embedded=embedded._replace(queries=queries)).of_widths(prefixes)
    training, log_odds, weights = _estimated(step)
    training = prefixes.weighted_sum(xp.reshape(training, shape), xp)
    if retrieval.readout is not None:
        training = training + prefixes.weights[-1] * widest_term(
            weights,
            scorer,
            prefixes,
            queries,
            readout=xp.where(usable.queries[:, None], retrieval.readout, 0.0),
            stale=pool.stale,
            constant=constant,
        )
    with backend.no_gradient():
        loss = prefixes.weighted_sum(xp.reshape(soft_plus(log_odds, xp=xp), shape), xp)
        last = Weights(every=last_width(weights.every, prefixes, xp))
        weighed = at_widest(constant(embedded.pool()), prefixes, xp)
        sums = weight_sums(last, weighed, xp=xp)
        return ByQuery(training, loss, xp.reshape(log_odds, shape)[:, -1], sums)


def _estimated(step: Step) -> tuple[Array, Array, Weights]:
    """Return the surrogate (B,), log((1 - p+) / p+) (B,), and the drawn rows' weights."""
    embedded, usable, retrieval, scorer, backend = step[:5]
    xp, constant = backend.xp, backend.stop_gradient
    queries, weighed = embedded.queries, embedded.pool()
    known = of_usable_queries(retrieval, usable.queries, scorer, backend)
    stale = known.stale_embeddings if known.pool is None else known.pool.stale
    positive = scorer.pairs(queries, embedded.positives)
    ceiling = None if step.margin is None else positive + step.margin
    parts = _full_negatives(embedded, retrieval, usable, scorer, step.hard_labels, ceiling)
    softmax = SampledSoftmax(
        constant(positive),
        cast(known.log_partition, scorer.dtype, xp),
        known.drawn,
        log_partition_of(parts, constant, xp),
        known.pool,
    )
    log_odds = softmax.log_odds(xp=xp)
    weights = step.estimator.weigh(softmax, xp=xp).without(~usable.pool, xp=xp)
    if step.staleness_correction:
        with backend.no_gradient():
            moved = _moved(weights, scorer, constant(queries), constant(weighed), stale)
            softmax, weights = corrected(softmax, weights, constant(moved), xp=xp)
    training = cache_term(
        weights, scorer, queries, weighed, readout=known.readout, stale=stale, constant=constant
    )
    training = training - positive_weight(softmax, weights, xp=xp) * positive
    if parts:
        training = training + full_terms(parts, softmax, constant, xp)
    return training, log_odds, weights


def _full_negatives(
    embedded: Embedded,
    retrieval: Retrieval,
    usable: Usable,
    scorer: Scorer,
    hard_labels: Labels | None,
    ceiling: Array | None,
) -> list[FullNegatives]:
    """Return the exact competitors: in-batch positives, hard negatives, and given scores."""
    parts, own = [], (retrieval.own or Exclusions())._replace(ceiling=ceiling)
    if retrieval.others is not None:
        scores = scorer.cross(embedded.queries, embedded.batch())
        counts: Any = retrieval.others.among(usable.batch, own, scores, xp=scorer.xp)
        parts.append(FullNegatives(scores, counts, retrieval.positive_bias))
    if embedded.hard is not None:
        scores = scorer.pairs(embedded.queries, embedded.hard)
        if hard_labels is None:
            own = Exclusions(ceiling=ceiling)
        admitted = own.admit(hard_labels or Labels(), scores)
        counts = usable.hard if admitted is None else usable.hard & admitted
        parts.append(FullNegatives(scores, counts))
    if embedded.competing is not None:
        parts.append(FullNegatives(embedded.competing, usable.competing))
    return parts


def _moved(weights: Weights, scorer: Scorer, queries: Array, fresh: Array, stale: Array) -> Array:
    """Return how a drawn row's score has changed since it was written, in the weights' shape."""
    if weights.own is None:
        return scorer.cross(queries, fresh) - scorer.cross(queries, stale)
    shape: Any = (-1, weights.own.shape[1], stale.shape[1])
    rows = (scorer.xp.reshape(each, shape) for each in (fresh, stale))
    now, then = (scorer.pairs(queries, each) for each in rows)
    return now - then
