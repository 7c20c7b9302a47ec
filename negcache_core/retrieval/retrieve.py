"""Phase one of a step: score the cache, draw negatives, and gather what the encoder needs.

Everything here is integers and constants; nothing is differentiated.
"""

from collections.abc import Mapping
from typing import Any

from negcache_core.arrays._array import Array, length, mask_rows, positions
from negcache_core.arrays.budget import rows_at_a_time
from negcache_core.arrays.exclusion import Exclusions, Labels
from negcache_core.retrieval.placement import Found, Placement, Sizes
from negcache_core.retrieval.positives import Others
from negcache_core.retrieval.prefixes import of_mixture
from negcache_core.retrieval.proposal import (
    CrossScores,
    Pool,
    log_proposals,
    log_proposals_by_chunk,
    pool_of,
)
from negcache_core.retrieval.request import Request
from negcache_core.retrieval.result import Retrieval
from negcache_core.retrieval.tiled_scores import CacheScores
from negcache_core.retrieval.top_k import group_of


def retrieve(request: Request, placement: Placement) -> Retrieval:
    """Draw negatives for checked arguments; slots are by cache name."""
    wanted, batch, backend = request.wanted, request.batch, request.backend
    xp, constant = backend.xp, backend.stop_gradient
    sizes = placement.meet(request)
    queries, own = request.queries, batch.own
    if own is None:
        (queries,) = placement.gather((queries,), sizes.rows)
    else:
        queries, *facts = placement.gather((queries, *own.arrays()), sizes.rows)
        own = Exclusions.of(facts)
    scores = request.scores(queries, own, placement.first(sizes.slots))
    drawn_rows = placement.draw(request, scores, sizes)
    fields, rows = drawn_rows.rows["fields"], drawn_rows.rows
    # Where nothing was drawn the row may be an empty slot's, which may hold anything, even NaN,
    # whose product with a weight of 0 is not 0.
    stale, flat = fields[wanted.embedding_key], xp.reshape(drawn_rows.drawn, (-1, 1))
    fields[wanted.embedding_key] = xp.where(flat, stale, xp.zeros_like(stale))
    others, bias, pool = None, None, None
    if wanted.in_batch:
        *items, group, bias = placement.gather((*batch.labels.arrays(), batch.bias), sizes.rows)
        place = positions(request.queries, xp) + placement.first(sizes.rows)
        others = Others(place, Labels(tuple(items), group))
    if wanted.shares_draws:
        if placement.sharded:  # the ones above are for everyone's queries
            scores = request.scores(request.queries, batch.own)
        pool = _pool(request, placement, sizes, scores[0], drawn_rows)
    log_partition, by_width = drawn_rows.log_partition, None
    if wanted.prefixes is not None:
        by_width, log_partition = constant(log_partition), log_partition[:, -1]
    features = {key: fields[key] for key in wanted.data_keys}
    return Retrieval(
        with_stand_ins(features, drawn_rows.drawn, request.stand_in, xp),
        drawn_rows.drawn,
        constant(log_partition),
        constant(drawn_rows.entropy),
        fields[wanted.embedding_key],
        rows["ages"],
        placement.fill(request, sizes),
        rows["slots"],
        rows["owned"],
        drawn_rows.route,
        pool,
        None if drawn_rows.readout is None else constant(drawn_rows.readout),
        others,
        bias,
        None if batch.own is None else batch.own.told(),
        None if request.caches.window is None else request.caches.window[0],
        by_width,
    )


def _pool(
    request: Request,
    placement: Placement,
    sizes: Sizes,
    scores: CacheScores,
    drawn_rows: Found,
) -> Pool:
    """Return the pool of all rows that were drawn for anyone."""
    wanted, backend, fields = request.wanted, request.backend, drawn_rows.rows["fields"]
    xp, scorer, groups, best = backend.xp, scores.scorer, None, drawn_rows.candidates
    known = [
        None if key is None else fields[key]
        for key in (wanted.embedding_key, *wanted.id_keys, wanted.group_key, wanted.bias_key)
    ]
    draws = () if drawn_rows.route is None else drawn_rows.route.sizes
    flat = xp.reshape(drawn_rows.drawn, (-1,))
    gathered = placement.gather((*known, drawn_rows.slots, flat), draws)
    stale, *ids, group, bias, slots, drawn = gathered
    if best is not None:
        groups = group_of(slots, sum(sizes.slots), best.shape[1], xp)
    labels = Labels(tuple(ids), group)
    cross: Any = CrossScores(scores.queries, scores.own, drawn, labels, bias, best, slots, groups)
    partition, numbers = drawn_rows.log_partition, stale.shape[0]
    if wanted.prefixes is not None:
        partition = of_mixture(partition, wanted.prefixes, xp)
        numbers = None if numbers is None else numbers * wanted.prefixes.number
    rows = backend.tile_rows(scores.queries)
    size = rows_at_a_time(rows, numbers, scorer.dtype, scores.budget, xp)
    if size is None:
        cross = backend.stop_gradient(cross.matrix(stale, scorer, backend))
        logs = log_proposals(cross, partition, xp=xp)
    else:
        logs = log_proposals_by_chunk(cross, partition, stale, size, scorer, backend)
    logs = placement.sum_logs(logs, xp)
    stale, logs = backend.stop_gradient(stale), backend.stop_gradient(logs)
    return pool_of(stale, cross, logs, wanted.num_samples, xp=xp)


def with_stand_ins(
    features: Mapping[str, Array], drawn: Array, stand_in: Mapping[str, Array] | None, xp: Any
) -> dict[str, Array]:
    """Return features (n, …) of drawn rows, or of `stand_in` where `drawn` (B, S) is False.

    So an encoder never sees the zeros of an empty slot.
    """
    if stand_in is None:
        return dict(features)
    count = length(next(iter(stand_in.values())), xp)
    flat = xp.reshape(drawn, (-1,))
    row = positions(flat, xp) // drawn.shape[1] % count
    return {
        key: xp.where(mask_rows(flat, rows), rows, xp.take_rows(stand_in[key], row))
        for key, rows in features.items()
    }
