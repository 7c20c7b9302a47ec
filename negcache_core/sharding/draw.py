"""Drawing from a cache that is split into shards: exactly as from one big cache.

Every replica scores all queries on its own shard. A shard is drawn by its weight, then a block and
a slot inside, by its owner; the rows travel to the replica whose query drew them.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from negcache_core.arrays._array import Array, cast, take_columns
from negcache_core.arrays.numerics import log_sum_exp
from negcache_core.retrieval.prefixes import of_parts
from negcache_core.retrieval.softmax_draw import draw_given_blocks, inverse_cdf, weigh_blocks
from negcache_core.retrieval.tiled_scores import CacheScores
from negcache_core.sharding.replicas import Replicas, Route


class ShardDraw(NamedTuple):
    """The m draws that this replica serves, and what it knows about its own B queries.

    slots:         (m, 1) in its own caches, in the order of their names
    scores:        (m,) stale; -inf where nothing could be drawn
    route:         who serves what
    log_partition: (B,) over all shards; with prefixes (B, W), and scores as in SoftmaxDraw
    readout:       (B, D) over all shards, or None
    candidates:    (B, k) best slot of each top-k group, over all shards, or None
    slot_of_all:   (m,) with candidates: the slots' numbers over all shards
    """

    slots: Array
    scores: Array
    route: Route
    log_partition: Array
    readout: Array | None = None
    candidates: Array | None = None
    slot_of_all: Array | None = None


def draw_from_shards(
    caches: Sequence[CacheScores],
    noise: Array,
    replicas: Replicas,
    sizes: tuple[int, ...],
    *,
    readout: bool,
) -> ShardDraw:
    """Draw for all queries; `caches` are this replica's, scored by everyone's queries.

    noise: (all queries, S, 2) uniforms, the same on every replica: the first picks a shard and,
           with what remains of it, a block, the second a slot. sizes: queries of each replica.
    """
    xp, draws = caches[0].scorer.xp, noise.shape[1]
    weights, mean = weigh_blocks(caches, readout=readout)
    noise = cast(noise, weights.dtype, xp)
    own = log_sum_exp(weights, xp=xp)
    (every,) = replicas.gather((own[None, ...],), (1,) * replicas.count)
    log_partition, parts, prefixes = log_sum_exp(every, 0, xp=xp), every, caches[0].scorer.prefixes
    if prefixes is not None:  # the weight of each shard over all widths
        parts = log_sum_exp(every - of_parts(log_partition, prefixes, xp)[None, :, :], xp=xp)
    shard, rest = _pick(xp.matrix_transpose(parts), noise[:, :, 0], xp=xp)
    owner = xp.reshape(shard, (-1,))
    entries = replicas.entries(owner)
    route = Route(owner, entries, tuple(size * draws for size in sizes))
    inner = xp.concat([xp.reshape(each, (-1, 1)) for each in (rest, noise[:, :, 1])], axis=1)

    def serve(entries: Array) -> tuple[Array, Array]:
        query = entries // draws
        drawn = draw_given_blocks(
            [cache.of_queries(query) for cache in caches],
            xp.take_rows(weights, query),
            xp.take_rows(inner, entries)[:, None, :],
            None if prefixes is None else xp.take_rows(log_partition, query),
        )
        return drawn.slots, drawn.scores

    if replicas.turns == 1:
        slots, scores = serve(entries)
    else:
        backend, size = caches[0].backend, entries.shape[0] // replicas.turns
        slots, scores = backend.fold_tiles(
            lambda turn: serve(backend.slice_rows(entries, turn * size, size)), replicas.turns
        )
    if readout:
        whole = xp.where(log_partition > -float("inf"), log_partition, 0.0)
        share = xp.exp(own - whole)
        share = share if prefixes is None else share[:, -1]
        mean = replicas.sum_of_parts(share[:, None] * mean, sizes)
    served = xp.take_rows(owner, entries) == replicas.rank
    return ShardDraw(
        slots - caches[0].first,
        xp.where(served, scores[:, 0], -float("inf")),
        route,
        replicas.own(log_partition, sizes),
        mean if readout else None,
    )


def _pick(log_weights: Array, uniforms: Array, *, xp: Any) -> tuple[Array, Array]:
    """Pick shards (B, S) by weight (B, n) with uniforms (B, S), and return what remains of those.

    What remains is uniform in [0, 1) again, whichever shard was picked.
    """
    shard = inverse_cdf(log_weights, uniforms, xp=xp)
    top = xp.max(log_weights, axis=1, keepdims=True)
    weights = xp.exp(log_weights - xp.where(top > -float("inf"), top, 0.0))
    cdf = xp.cumulative_sum(weights, axis=1)
    end, width = take_columns(cdf, shard, xp), take_columns(weights, shard, xp)
    rest = (uniforms * cdf[:, -1:] - (end - width)) / xp.where(width > 0, width, 1.0)
    return shard, xp.clip(rest, 0.0, 1.0)
