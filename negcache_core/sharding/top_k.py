"""Top-k when the groups' slots are in shards."""

import functools
import itertools
from collections.abc import Sequence

from negcache_core.arrays._array import Array, cast, take_columns
from negcache_core.errors import OptionError
from negcache_core.retrieval.softmax_draw import draw_from_softmax
from negcache_core.retrieval.tiled_scores import CacheScores
from negcache_core.retrieval.top_k import best_of_all_groups
from negcache_core.sharding.draw import ShardDraw
from negcache_core.sharding.replicas import Replicas, Route


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
    # If shapes must be known, every replica has all draws, and ignores the others'.
    own, served = xp.take_rows(slots, entries), xp.take_rows(owner, entries) == replicas.rank
    return ShardDraw(
        xp.where(served, own - caches[0].first, 0)[:, None],
        xp.where(served, xp.take_rows(all_scores, entries), -float("inf")),
        Route(owner, entries, draws),
        log_partition,
        candidates=places,
        slot_of_all=own,
    )


def _groups_inside(k: int, capacities: Sequence[Sequence[int]]) -> int | None:
    """Return how many of k groups each replica has, if all are equal and none is split; or None.

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
    """Return the best score of each group and its slot, (own queries, k), if shards split some."""
    xp, rank = caches[0].scorer.xp, replicas.rank
    if not isinstance(rank, int):
        slots = sum(capacities[0])
        raise OptionError(
            f"top_k is {k}, but its groups do not fit {len(capacities)} shards of {slots} slots: "
            f"a group cannot span two of them. Choose {len(capacities)} times a divisor of "
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
    # If several shards hold a part of a group: the best one, from the first shard that has it.
    places = functools.reduce(
        lambda later, each: xp.where(each[0] == top, each[1], later),
        [(scores[r, ...], places[r, ...]) for r in reversed(range(replicas.count))],
        places[0, ...],
    )
    return top, places
