"""Approximate top-k: the best of each of k contiguous groups of slots."""

import itertools
from collections.abc import Sequence
from typing import Any

from negcache_core.arrays._array import (
    Array,
    arange_like,
    cast,
    concat_rows,
    length,
    namespace,
    take_columns,
)
from negcache_core.arrays.validation import as_whole, check_floating
from negcache_core.errors import CapacityError, KindError, ShapeError
from negcache_core.retrieval.tiled_scores import CacheScores


def check_top_k(k: Any) -> int | None:
    """Return `k` as an int, or None; raise unless it is None or a positive integer."""
    if k is None:
        return None
    number = as_whole(k)
    if number is None:
        raise KindError(f"top_k is {k!r}: expected None or a positive int.")
    if number < 1:
        raise CapacityError(f"top_k is {k}: expected at least 1, or None to use every slot.")
    return number


def check_groups(k: int, slots: int) -> None:
    """Raise CapacityError unless there is at least one slot for each of k groups."""
    if k > slots:
        raise CapacityError(
            f"top_k is {k}, but there are {slots} slots: at most one group for each slot. Lower "
            "top_k, or raise cache_size."
        )


def group_of(slots: Array, total: int, k: int, xp: Any) -> Array:
    """Return which of k contiguous groups of `total` slots each of `slots` is in.

    >>> import numpy as np
    >>> group_of(np.arange(5), 5, 2, np)
    array([0, 0, 0, 1, 1])
    """
    width, longer = divmod(total, k)
    cut = longer * (width + 1)
    return xp.where(slots < cut, slots // (width + 1), longer + (slots - cut) // width)


def approximate_top_k_with_indices(scores: Array, k: int, *, xp: Any = None) -> tuple[Array, Array]:
    """Return the best score of each of k contiguous groups of columns, and the column it is in.

    scores: (B, C), one row per query
    k:      the number of groups, 1 <= k <= C; the first C mod k groups have one more column

    Differs from the published code, where k must divide C. Raises CapacityError if k > C.

    >>> import numpy as np
    >>> approximate_top_k_with_indices(np.asarray([[1.0, 2.0, 3.0, 9.0, 4.0]]), 2)
    (array([[3., 9.]]), array([[2, 3]]))
    """
    xp = namespace(scores, xp=xp)
    k = check_top_k(k) or 1
    if len(scores.shape) != 2:
        raise ShapeError(f"scores has shape {tuple(scores.shape)}: expected (B, C).")
    check_floating(scores, "scores")
    columns = scores.shape[1]
    check_groups(k, columns)
    width, longer = divmod(columns, k)
    cut = longer * (width + 1)
    best, places = [], []
    # Groups of two sizes: the longer ones first.
    for start, stop, size in ((0, cut, width + 1), (cut, columns, width)):
        if start == stop:
            continue
        groups = xp.reshape(scores[:, start:stop], (-1, (stop - start) // size, size))
        best.append(xp.max(groups, axis=-1))
        first = start + size * arange_like((stop - start) // size, scores, xp)
        places.append(xp.argmax(groups, axis=-1) + first)
    return xp.concat(best, axis=1), xp.concat(places, axis=1)


def best_of_groups(cache: CacheScores, start: int, groups: int, width: int) -> tuple[Array, ...]:
    """Return the best score of each of `groups` groups of `width` slots, and its slot.

    start: the first group's first slot in this cache. Both results are (groups, B); slots are
    numbered over all caches, and ties go to the lowest.
    """
    xp = cache.scorer.xp

    def best(begin: Any, count: int, width: int) -> tuple[Array, Array]:
        scores = cache.mask(*cache.by_slot(begin, count * width)[:2])
        scores = xp.reshape(scores, (count, width, -1))
        place = xp.argmax(scores, axis=1)
        first = arange_like(count, place, xp) * width + begin + cache.first
        return xp.max(scores, axis=1), place + first[:, None]

    if width > cache.tile:
        # One fold over the whole tiles of all groups, and one over their remainders.
        tiles, rest = divmod(width, cache.tile)
        parts = cache.backend.fold_tiles(
            lambda at: best(start + at // tiles * width + at % tiles * cache.tile, 1, cache.tile),
            groups * tiles,
        )
        shaped = [tuple(xp.reshape(part, (groups, tiles, -1)) for part in parts)]
        if rest:
            first = start + tiles * cache.tile
            parts = cache.backend.fold_tiles(
                lambda group: best(first + group * width, 1, rest), groups
            )
            shaped.append(tuple(part[:, None, :] for part in parts))
        return best_of_parts(
            *(xp.concat(list(each), axis=1) for each in zip(*shaped, strict=True)), xp=xp
        )
    return cache.over_tiles(
        lambda at, size: best(start + at, size // width, width),
        groups * width,
        cache.tile // width * width,
    )


def no_groups(cache: CacheScores, groups: int) -> tuple[Array, Array]:
    """Return what `best_of_groups` would of groups that have no slot."""
    xp = cache.scorer.xp
    zero = xp.broadcast_to(
        xp.sum(xp.zeros_like(cache.queries), axis=1)[None, :],
        (groups, length(cache.queries, xp)),
    )
    return zero - float("inf"), cast(zero, xp.index_dtype, xp)


def best_of_parts(scores: Array, places: Array, *, xp: Any) -> tuple[Array, Array]:
    """Return the highest of scores (groups, n, B) in each group, and its place: (groups, B)."""
    groups, parts = scores.shape[:2]
    scores, places = (
        xp.reshape(xp.matrix_transpose(each), (-1, parts)) for each in (scores, places)
    )
    best = xp.argmax(scores, axis=1)[:, None]
    scores, places = (take_columns(each, best, xp) for each in (scores, places))
    return xp.reshape(scores, (groups, -1)), xp.reshape(places, (groups, -1))


def best_of_all_groups(
    caches: Sequence[CacheScores | None], k: int, capacities: tuple[int, ...] = ()
) -> tuple[Array, Array]:
    """Return the best score in each of k contiguous groups of all slots, and its slot: (B, k).

    capacities: of all caches, where some are None: those are elsewhere, and a group without a slot
                here scores -inf
    """
    here = [cache for cache in caches if cache is not None]
    xp = here[0].scorer.xp
    parts = []
    for stretches, groups, width in group_runs(
        capacities or tuple(cache.slots for cache in here), k
    ):
        best_here = [
            best_of_groups(each, start, groups, width or size)
            for each, start, size in ((caches[number], *part) for number, *part in stretches)
            if each is not None
        ] or [no_groups(here[0], groups)]
        both = concat_rows(best_here, xp)
        if len(best_here) > 1:
            both = best_of_parts(*(part[None, :, :] for part in both), xp=xp)
        parts.append(both)
    best, places = concat_rows(parts, xp)
    return xp.matrix_transpose(best), xp.matrix_transpose(places)


def group_runs(capacities: tuple[int, ...], k: int) -> tuple[Any, ...]:
    """Cut the slots of several caches into k groups, and gather equal neighbours into runs.

    Returns, in order, (stretches, groups, width). A run inside one cache has one stretch (cache,
    start, size) and a width. A group that lies in several caches is a run of its own, with a
    stretch in each and width 0.

    >>> group_runs((4, 3), 3)  # groups of 3, 2 and 2 slots; the second lies in both caches
    ((((0, 0, 3),), 1, 3), (((0, 3, 1), (1, 0, 1)), 1, 0), (((1, 1, 2),), 1, 2))
    """
    starts = [sum(capacities[:number]) for number in range(len(capacities) + 1)]
    width, longer = divmod(starts[-1], k)
    runs: list[Any] = []

    def add_shared(begin: int, end: int) -> None:
        stretches = [
            (number, max(begin, first) - first, min(end, last) - max(begin, first))
            for number, (first, last) in enumerate(itertools.pairwise(starts))
            if max(begin, first) < min(end, last)
        ]
        runs.append((tuple(stretches), 1, 0))

    for begin, groups, size in ((0, longer, width + 1), (longer * (width + 1), k - longer, width)):
        done = 0
        for number, (first, last) in enumerate(itertools.pairwise(starts)):
            lowest = max(done, -((begin - first) // size))  # the first group inside this cache
            highest = min(groups, (last - begin) // size)
            if lowest >= groups or last <= begin:
                continue
            for group in range(done, lowest):
                add_shared(begin + group * size, begin + (group + 1) * size)
            done = max(lowest, done)
            if highest > done:
                start = begin + done * size - first
                runs.append((((number, start, (highest - done) * size),), highest - done, size))
                done = highest
        for group in range(done, groups):
            add_shared(begin + group * size, begin + (group + 1) * size)
    return tuple(runs)
