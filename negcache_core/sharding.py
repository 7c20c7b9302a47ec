"""Drawing from a cache that is cut into shards: exactly the law of the one big cache.

Every replica scores all queries on its own shard. A shard is drawn by its weight, then a block and
a slot inside, by its owner; the rows travel to the replica whose query drew them.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

from negcache_core._array import Array, cast, positions, take, take_columns
from negcache_core.errors import CapacityError, OptionError
from negcache_core.matching import equal_rows, first_match
from negcache_core.replicas import Replicas, Route
from negcache_core.sampling import draw_from_softmax, inverse_cdf
from negcache_core.scoring import log_sum_exp
from negcache_core.streaming import (
    CacheScores,
    best_of_all_groups,
    draw_given_blocks,
    weigh_blocks,
)


class ShardDraw(NamedTuple):
    """The draws that this replica serves, m of them, and what it knows of its own B queries.

    slots:         (m, 1) in its own caches, in the order of their names
    scores:        (m,) stale; -inf where nothing could be drawn
    route:         who serves what
    log_partition: (B,) over all shards
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
    """Draw for all queries; `caches` are this replica's, scored by the queries of all.

    noise: (all queries, S, 2) uniforms, the same on every replica: the first picks a shard and, by
           what is left of it, a block in it, the second a slot. sizes: queries of each replica.
    """
    xp, draws = caches[0].scorer.xp, noise.shape[1]
    weights, mean = weigh_blocks(caches, readout=readout)
    noise = cast(noise, weights.dtype, xp)
    own = log_sum_exp(weights, xp=xp)
    (every,) = replicas.gather((own[None, :],), (1,) * replicas.count)
    shard, rest = _pick(xp.matrix_transpose(every), noise[:, :, 0], xp=xp)
    owner = xp.reshape(shard, (-1,))
    entries = replicas.entries(owner)
    route = Route(owner, entries, tuple(size * draws for size in sizes))
    inner = xp.concat([xp.reshape(each, (-1, 1)) for each in (rest, noise[:, :, 1])], axis=1)

    def serve(entries: Array) -> tuple[Array, Array]:
        query = entries // draws
        drawn = draw_given_blocks(
            [cache.of_queries(query) for cache in caches],
            take(weights, query, xp),
            take(inner, entries, xp)[:, None, :],
        )
        return drawn.slots, drawn.scores

    if replicas.turns == 1:
        slots, scores = serve(entries)
    else:
        backend, size = caches[0].backend, entries.shape[0] // replicas.turns
        slots, scores = backend.fold_tiles(
            lambda turn: serve(backend.slice_rows(entries, turn * size, size)), replicas.turns
        )
    log_partition = log_sum_exp(every, 0, xp=xp)
    if readout:
        whole = xp.where(log_partition > -float("inf"), log_partition, 0.0)
        share = xp.exp(own - whole)
        mean = replicas.sum_of_parts(share[:, None] * mean, sizes)
    served = take(owner, entries, xp) == replicas.rank
    return ShardDraw(
        slots - caches[0].first,
        xp.where(served, scores[:, 0], -float("inf")),
        route,
        replicas.own(log_partition, sizes),
        mean if readout else None,
    )


def draw_from_shard_groups(
    caches: Sequence[CacheScores],
    k: int,
    noise: Array,
    replicas: Replicas,
    sizes: tuple[int, ...],
    capacities: Sequence[Sequence[int]],
) -> ShardDraw:
    """Draw from the best slots of k contiguous groups of all shards' slots.

    noise: (own queries, S, 2); capacities: those of each replica's caches
    """
    xp = caches[0].scorer.xp
    groups = _groups_inside(k, capacities)
    if groups is None:
        top, places = _best_of_shared_groups(caches, k, replicas, sizes, capacities)
    else:
        parts = [replicas.parts(each, sizes) for each in best_of_all_groups(caches, groups)]
        top, places = (
            xp.concat([each[r, ...] for r in range(replicas.count)], axis=1) for each in parts
        )
    chosen, log_partition = draw_from_softmax(top, noise, xp=xp)
    slots, chosen_scores = take_columns(places, chosen, xp), take_columns(top, chosen, xp)
    draws = tuple(size * noise.shape[1] for size in sizes)
    slots, all_scores = replicas.gather(
        [xp.reshape(each, (-1,)) for each in (slots, chosen_scores)], draws
    )
    ends = list(itertools.accumulate(sum(each) for each in capacities))
    owner = functools.reduce(
        lambda found, end: found + cast(slots >= end, slots.dtype, xp), ends[:-1], slots * 0
    )
    entries = replicas.entries(owner)
    own = take(slots, entries, xp) - caches[0].first
    return ShardDraw(
        own[:, None],
        take(all_scores, entries, xp),
        Route(owner, entries, draws),
        log_partition,
        candidates=places,
        slot_of_all=take(slots, entries, xp),
    )


def _groups_inside(k: int, capacities: Sequence[Sequence[int]]) -> int | None:
    """Return how many of k groups each replica has, where all are equal and none is cut; or None.

    >>> _groups_inside(6, ((4, 2), (4, 2))), _groups_inside(4, ((3,), (3,)))
    (3, None)
    """
    slots, count = sum(capacities[0]), len(capacities)
    alike = len(set(map(sum, capacities))) == 1
    return k // count if alike and k % count == 0 and slots % (k // count) == 0 else None


def _best_of_shared_groups(
    caches: Sequence[CacheScores],
    k: int,
    replicas: Replicas,
    sizes: tuple[int, ...],
    capacities: Sequence[Sequence[int]],
) -> tuple[Array, Array]:
    """Return the best score of each group and its slot, (own queries, k), where shards cut some."""
    xp, rank = caches[0].scorer.xp, replicas.rank
    if not isinstance(rank, int):
        slots = sum(capacities[0])
        raise OptionError(
            f"top_k is {k}, and its groups do not fit {len(capacities)} shards of {slots} slots: "
            f"here a group cannot lie in two of them. Choose {len(capacities)} times a divisor of "
            f"{slots}."
        )
    before, after = (
        [None] * sum(len(each) for each in part)
        for part in (capacities[:rank], capacities[rank + 1 :])
    )
    every = tuple(itertools.chain.from_iterable(capacities))
    best, places = best_of_all_groups([*before, *caches, *after], k, every)
    scores = replicas.parts(best, sizes)
    places = replicas.parts(places, sizes)
    top = xp.max(scores, axis=0)
    # Where several shards hold a part of a group: the best, of the first shard that has it.
    places = functools.reduce(
        lambda later, each: xp.where(each[0] == top, each[1], later),
        [(scores[r, ...], places[r, ...]) for r in reversed(range(replicas.count))],
        places[0, ...],
    )
    return top, places


def _pick(log_weights: Array, uniforms: Array, *, xp: Any) -> tuple[Array, Array]:
    """Pick shards (B, S) by weight (B, n) with uniforms (B, S), and return what is left of those.

    What is left is uniform in [0, 1) again, whichever shard was picked.
    """
    shard = inverse_cdf(log_weights, uniforms, xp=xp)
    top = xp.max(log_weights, axis=1, keepdims=True)
    weights = xp.exp(log_weights - xp.where(top > -float("inf"), top, 0.0))
    cdf = xp.cumulative_sum(weights, axis=1)
    end, width = take_columns(cdf, shard, xp), take_columns(weights, shard, xp)
    rest = (uniforms * cdf[:, -1:] - (end - width)) / xp.where(width > 0, width, 1.0)
    return shard, xp.clip(rest, 0.0, 1.0)


def bring_home(
    keys: Array,
    mask: Array,
    held: Array,
    written: Array,
    replicas: Replicas,
    sizes: tuple[int, ...],
    slots: Sequence[int],
    *,
    xp: Any,
) -> Route:
    """Decide which replica stores each new row where an item has one slot in all shards.

    keys:  (own rows, …) which items they are; mask: bool (own rows,), False for rows that stay out
    held:  (C, …) the items in this replica's slots; written: bool (C,)
    sizes: rows of each replica; slots: of each shard

    The replica that holds an item gets it; a new one goes to the last replica that has it in its
    batch, with all its copies. Raises CapacityError if a shard could not take what may come.
    """
    if sum(sizes) > min(slots):
        raise CapacityError(
            f"the replicas insert {sum(sizes)} rows a step, and with unique_key all may come to "
            f"one shard of {min(slots)} slots: raise cache_size, or insert fewer rows."
        )
    every, counted = replicas.gather([keys, mask], sizes)
    here = first_match(every, held, written, xp=xp)[1]
    (holders,) = replicas.gather([here[None, :]], (1,) * replicas.count)
    place = positions(every, xp)
    asker = place * 0
    for end in itertools.accumulate(sizes[:-1]):
        asker = asker + cast(place >= end, place.dtype, xp)
    last, same = place, equal_rows(every, every, xp=xp) & counted[None, :]
    if sum(sizes):  # some libraries know no largest of nothing
        last = xp.max(xp.where(same, place[None, :], 0), axis=1)
    home = xp.where(
        xp.any(holders, axis=0),
        xp.argmax(cast(holders, xp.uint8, xp), axis=0),
        xp.where(counted, take(asker, last, xp), asker),
    )
    return Route(home, replicas.entries(home), sizes)
