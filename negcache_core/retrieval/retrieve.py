"""Phase one of a step: score the cache, draw negatives, and gather what the encoder needs.

Everything here is integers and constants; nothing is differentiated.
"""

from collections.abc import Mapping
from typing import Any

from negcache_core.arrays._array import Array, length, mask_rows, positions
from negcache_core.arrays.exclusion import Exclusions, Labels
from negcache_core.retrieval.placement import Found, Placement, Sizes
from negcache_core.retrieval.positives import others_of
from negcache_core.retrieval.proposal import Pool, cross_scores, pool_of
from negcache_core.retrieval.request import Request
from negcache_core.retrieval.result import Retrieval
from negcache_core.retrieval.tiled_scores import CacheScores


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
    others, bias, pool = None, None, None
    if wanted.in_batch:
        *items, group, bias = placement.gather((*batch.labels.arrays(), batch.bias), sizes.rows)
        labels, first = Labels(tuple(items), group), placement.first(sizes.rows)
        others = others_of(request.queries, batch.own, queries, labels, first, xp=xp)
    if wanted.shares_draws:
        if placement.sharded:  # those above are of everyone's queries
            scores = request.scores(request.queries, batch.own)
        pool = Pool(*map(constant, _pool(request, placement, sizes, scores, drawn_rows)))
    fields, rows = drawn_rows.rows["fields"], drawn_rows.rows
    features = {key: fields[key] for key in wanted.data_keys}
    return Retrieval(
        with_stand_ins(features, drawn_rows.drawn, request.stand_in, xp),
        drawn_rows.drawn,
        constant(drawn_rows.log_partition),
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
    )


def _pool(
    request: Request,
    placement: Placement,
    sizes: Sizes,
    scores: list[CacheScores],
    drawn_rows: Found,
) -> Pool:
    """Return what is known of all rows that were drawn for anyone."""
    wanted, xp, fields = request.wanted, request.backend.xp, drawn_rows.rows["fields"]
    known = [
        None if key is None else fields[key]
        for key in (wanted.embedding_key, *wanted.id_keys, wanted.group_key, wanted.bias_key)
    ]
    draws = () if drawn_rows.route is None else drawn_rows.route.sizes
    flat = xp.reshape(drawn_rows.drawn, (-1,))
    gathered = placement.gather((*known, drawn_rows.slots, flat), draws)
    stale, *ids, group, bias, slots, drawn = gathered
    labels = Labels(tuple(ids), group)
    cross = cross_scores(
        scores[0], stale, labels, bias, drawn, slots, drawn_rows.candidates, sum(sizes.slots)
    )
    return pool_of(
        cross,
        drawn_rows.log_partition,
        stale,
        wanted.num_samples,
        xp=xp,
        sum_logs=lambda logs: placement.sum_logs(logs, xp),
    )


def with_stand_ins(
    features: Mapping[str, Array], drawn: Array, stand_in: Mapping[str, Array] | None, xp: Any
) -> dict[str, Array]:
    """Return features (n, …) of drawn rows, with those of `stand_in` where `drawn` (B, S) is False.

    So an encoder never sees the zeros of a slot that was not written.
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
