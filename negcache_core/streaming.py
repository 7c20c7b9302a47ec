"""Streaming retrieval: the cache is scored a tile at a time, and B x C scores never exist.

Of each block of slots only the log-sum-exp of its scores is kept. A draw picks a block by its
weight, scores that block again, and picks a slot inside: exactly softmax sampling, for
B x C / BLOCK numbers of memory. Of each top-k group only the best score and its slot are kept.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from negcache_core._array import (
    Array,
    arange_like,
    cast,
    concat_rows,
    fill,
    index_dtype,
    length,
    take,
    take_columns,
)
from negcache_core.backend import Backend
from negcache_core.sampling import BLOCK, draw_in_blocks
from negcache_core.scoring import Scorer, log_sum_exp
from negcache_core.state import is_written

UNKNOWN_ROWS = 256
"""Queries assumed where tracing leaves their number open: it sizes tiles, and never the law."""


def tile_slots(rows: int | None, width: int, itemsize: int, tile_bytes: int) -> int:
    """Return how many slots a tile has: whole blocks, as many as fit the budget, at least one.

    A slot takes two numbers for each of `rows` queries, its score and that one's exponential, and
    `width` numbers for its embedding, if that is copied to be sliced or raised to another dtype.

    >>> tile_slots(64, 0, 4, 2**20)
    2048
    """
    per_slot = itemsize * (2 * max(1, UNKNOWN_ROWS if rows is None else rows) + width)
    return max(BLOCK, tile_bytes // per_slot // BLOCK * BLOCK)


class CacheScores(NamedTuple):
    """The scores of queries (B, D) against one cache, any part of them on demand.

    They are -inf where a slot is empty or holds an item that is a positive of the query.

    queries:      with the scale in them; `scorer` then has none
    first:        the number that slot 0 of this cache has among all caches' slots
    tile:         slots to score at a time
    ids:          (C,) which item each row is, or None
    positive_ids: (B, P) which items are positives of each query
    bias:         (C,) taken from each row's scores, or None
    """

    queries: Array
    table: Array
    age: Array
    first: int
    tile: int
    scorer: Scorer
    backend: Backend
    ids: Array | None = None
    positive_ids: Any = None
    bias: Array | None = None

    @property
    def slots(self) -> int:
        """The capacity."""
        return int(self.age.shape[0])

    @property
    def blocks(self) -> int:
        """The number of blocks, the last of which may be short."""
        return -(-self.slots // BLOCK)

    def matrix(self) -> Array:
        """Score all slots at once: (B, C), for a user's function of the score matrix."""
        return self.scorer.xp.matrix_transpose(self._mask(*self._by_slot(0, self.slots)[:2]))

    def block_weights(self, readout: tuple[Array, ...] = ()) -> tuple[Array, tuple[Array, ...]]:
        """Return the log-sum-exp of every block, (B, blocks), and `readout` with this cache in it.

        readout: what `join_readouts` made of the caches so far; () where it is not wanted
        """
        xp = self.scorer.xp

        def weigh(
            readout: tuple[Array, ...], start: Any, size: int
        ) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
            scores, written, rows = self._by_slot(start, size)
            mean = None
            if readout and self.ids is None and self.bias is None:
                mean = self.backend.attention(self.queries, rows, written)
            if readout and mean is None:
                # Rows of empty slots may hold anything, and 0 times it need not be 0.
                rows = xp.where(written[:, None], cast(rows, self.scorer.dtype, xp), 0.0)
                readout = join_readouts(
                    readout, read_out(self._mask(scores, written), rows, xp=xp), xp=xp
                )
            short = -size % BLOCK
            if short:
                pad = xp.broadcast_to(fill((1, 1), 0, scores, xp), (short, length(scores, xp, 1)))
                scores = xp.concat([scores, pad], axis=0)
                written = xp.concat([written, fill((short,), value=False, like=written, xp=xp)])
            weights = self.backend.block_log_sum_exp(scores, written, BLOCK)
            if mean is not None:
                readout = join_readouts(readout, (log_sum_exp(weights, 0, xp=xp), mean), xp=xp)
            return readout, (weights,)

        readout, (weights,) = self._scan_tiles(weigh, readout, self.slots, self.tile)
        return xp.matrix_transpose(weights), readout

    def of_blocks(self, block: Array) -> Array:
        """Score blocks (B, S) by number again: (B, S, BLOCK); -inf outside of the cache."""
        xp, draws = self.scorer.xp, block.shape[1]
        every = block[:, :, None] * BLOCK + arange_like(BLOCK, block, xp)[None, None, :]
        there = (every >= 0) & (every < self.slots)
        flat = xp.reshape(xp.where(there, every, 0), (-1,))
        rows = xp.reshape(take(self.table, flat, xp), (-1, draws * BLOCK, self.table.shape[1]))
        scores = xp.reshape(self.scorer.by_row(self.queries, rows), (-1, draws, BLOCK))
        if self.bias is not None:
            scores = scores - xp.reshape(take(self.bias, flat, xp), (-1, draws, BLOCK))
        if self.ids is not None:
            ids = xp.reshape(take(self.ids, flat, xp), (-1, draws, BLOCK))
            for place in range(self.positive_ids.shape[1]):
                there = there & (ids != self.positive_ids[:, None, None, place])
        written = is_written(xp.reshape(take(self.age, flat, xp), (-1, draws, BLOCK)))
        return xp.where(there & written, scores, -float("inf"))

    def best_of_groups(self, start: int, groups: int, width: int) -> tuple[Array, ...]:
        """Return the best score of each of `groups` groups of `width` slots, and its slot.

        start: the first group's first slot in this cache. Both results are (groups, B); slots are
        numbered over all caches, and ties go to the lowest.
        """
        xp = self.scorer.xp

        def best(begin: Any, count: int, width: int) -> tuple[Array, Array]:
            scores = self._mask(*self._by_slot(begin, count * width)[:2])
            scores = xp.reshape(scores, (count, width, -1))
            place = xp.argmax(scores, axis=1)
            first = arange_like(count, place, xp) * width + begin + self.first
            return xp.max(scores, axis=1), place + first[:, None]

        if width > self.tile:
            # A fold over the whole tiles of all groups, and one over what is left of each.
            tiles, rest = divmod(width, self.tile)
            parts = self.backend.fold_tiles(
                lambda at: best(start + at // tiles * width + at % tiles * self.tile, 1, self.tile),
                groups * tiles,
            )
            shaped = [tuple(xp.reshape(part, (groups, tiles, -1)) for part in parts)]
            if rest:
                first = start + tiles * self.tile
                parts = self.backend.fold_tiles(
                    lambda group: best(first + group * width, 1, rest), groups
                )
                shaped.append(tuple(part[:, None, :] for part in parts))
            return best_of_parts(
                *(xp.concat(list(each), axis=1) for each in zip(*shaped, strict=True)), xp=xp
            )
        return self._over_tiles(
            lambda at, size: best(start + at, size // width, width),
            groups * width,
            self.tile // width * width,
        )

    def no_groups(self, groups: int) -> tuple[Array, Array]:
        """Return what `best_of_groups` would of groups that have no slot."""
        xp = self.scorer.xp
        zero = xp.broadcast_to(
            xp.sum(xp.zeros_like(self.queries), axis=1)[None, :],
            (groups, length(self.queries, xp)),
        )
        return zero - float("inf"), cast(zero, index_dtype(xp), xp)

    def of_queries(self, rows: Array) -> "CacheScores":
        """Return the scores of some of the queries, or of all several times: rows (n,) of them."""
        xp, own = self.scorer.xp, self.positive_ids
        return self._replace(
            queries=take(self.queries, rows, xp),
            positive_ids=None if own is None else take(own, rows, xp),
        )

    def _by_slot(self, start: Any, size: int) -> tuple[Array, Array, Array]:
        """Score slots start … start + size - 1: (size, B); which are written, (size,); their rows.

        One row of scores for each slot: products with a tall result and reductions down its columns
        are measured to be faster than with a wide one. `start` may be a traced integer.
        """
        rows, age = (
            self.backend.slice_rows(array, start, size) for array in (self.table, self.age)
        )
        scores = self.scorer.by_item(self.queries, rows)
        if self.bias is not None:
            scores = scores - self.backend.slice_rows(self.bias, start, size)[:, None]
        if self.ids is not None:
            ids = self.backend.slice_rows(self.ids, start, size)
            scores = self.backend.exclude(scores, ids, self.positive_ids)
        return scores, is_written(age), rows

    def _mask(self, scores: Array, written: Array) -> Array:
        # Scale first, then mask: an infinite score times a scale has no gradient.
        return self.scorer.xp.where(written[:, None], scores, -float("inf"))

    def _over_tiles(
        self, function: Callable[[Any, int], tuple[Array, ...]], slots: int, tile: int
    ) -> tuple[Array, ...]:
        """Concatenate function(start, size) over the tiles of a stretch and what is left of it."""
        return self._scan_tiles(
            lambda carry, start, size: (carry, function(start, size)), (), slots, tile
        )[1]

    def _scan_tiles(
        self,
        function: Callable[[Any, Any, int], tuple[tuple[Array, ...], tuple[Array, ...]]],
        carry: tuple[Array, ...],
        slots: int,
        tile: int,
    ) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        """Do it with function(carry, start, size) -> (carry, parts)."""
        count, rest = divmod(slots, tile)
        found = []
        if count:
            carry, parts = self.backend.scan_tiles(
                lambda carry, at: function(carry, at * tile, tile), carry, count
            )
            found.append(parts)
        if rest:
            carry, parts = function(carry, count * tile, rest)
            found.append(parts)
        return carry, concat_rows(found, self.scorer.xp)


def empty_readout(queries: Array, *, xp: Any) -> tuple[Array, Array]:
    """Return the readout of no slots: log-partition (B,) of -inf, and mean embedding (B, D)."""
    zero = xp.zeros_like(queries)
    return xp.sum(zero, axis=1) - float("inf"), zero


def read_out(scores: Array, rows: Array, *, xp: Any) -> tuple[Array, Array]:
    """Return the log-sum-exp (B,) of scores (n, B), and the mean (B, D) of rows by their softmax.

    This is attention with keys and values alike.
    """
    top = xp.max(scores, axis=0)
    top = xp.where(top > -float("inf"), top, 0.0)
    law = xp.exp(scores - top[None, :])
    total = xp.sum(law, axis=0)
    some = xp.where(total > 0, total, 1.0)
    added = xp.where(total > 0, xp.log(some) + top, -float("inf"))
    return added, xp.matmul(xp.matrix_transpose(law), rows) / some[:, None]


def join_readouts(
    readout: tuple[Array, ...], added: tuple[Array, Array], *, xp: Any
) -> tuple[Array, Array]:
    """Return the readout of the slots of two together: log-partition (B,) and mean (B, D)."""
    parts = xp.concat([readout[0][None, :], added[0][None, :]], axis=0)
    both = log_sum_exp(parts, 0, xp=xp)
    shares = xp.exp(parts - xp.where(both > -float("inf"), both, 0.0)[None, :])
    return both, readout[1] * shares[0, :, None] + added[1] * shares[1, :, None]


def best_of_parts(scores: Array, places: Array, *, xp: Any) -> tuple[Array, Array]:
    """Return the highest of scores (groups, n, B) in each group, and its place: (groups, B)."""
    groups, parts = scores.shape[:2]
    scores, places = (
        xp.reshape(xp.matrix_transpose(each), (-1, parts)) for each in (scores, places)
    )
    best = xp.argmax(scores, axis=1)[:, None]
    scores, places = (take_columns(each, best, xp) for each in (scores, places))
    return xp.reshape(scores, (groups, -1)), xp.reshape(places, (groups, -1))


class SoftmaxDraw(NamedTuple):
    """What was drawn from the softmax over the written slots of all caches.

    slots (B, S), numbered over all caches, and their scores (B, S); log_partition (B,), -inf for no
    slot; readout (B, D), the mean of all embeddings under the law, where it was asked for
    """

    slots: Array
    scores: Array
    log_partition: Array
    readout: Array | None = None


def draw_from_caches(
    caches: Sequence[CacheScores], noise: Array, *, readout: bool = False
) -> SoftmaxDraw:
    """Draw from the softmax over the written slots of all caches.

    noise: (B, S, 2) uniforms in [0, 1): the first picks a block of slots, the second a slot in it.
    Differs from the 2021 code, which scores everything at once and adds noise to every score.
    """
    weights, mean = weigh_blocks(caches, readout=readout)
    return draw_given_blocks(caches, weights, noise)._replace(readout=mean)


def weigh_blocks(
    caches: Sequence[CacheScores], *, readout: bool = False
) -> tuple[Array, Array | None]:
    """Return the log-sum-exp of every block of all caches, (B, blocks), and the readout (B, D)."""
    xp, parts = caches[0].scorer.xp, []
    mean: tuple[Array, ...] = empty_readout(caches[0].queries, xp=xp) if readout else ()
    for cache in caches:
        part, mean = cache.block_weights(mean)
        parts.append(part)
    return xp.concat(parts, axis=1), mean[1] if readout else None


def draw_given_blocks(caches: Sequence[CacheScores], weights: Array, noise: Array) -> SoftmaxDraw:
    """Draw as `draw_from_caches` does, from what `weigh_blocks` found, or from rows of that."""
    xp = caches[0].scorer.xp
    passed = list(itertools.accumulate((cache.blocks for cache in caches), initial=0))

    def scores_of(block: Array) -> Array:
        # Each block is in one cache, and scores -inf in the others.
        parts = [
            cache.of_blocks(block - first) for cache, first in zip(caches, passed, strict=False)
        ]
        return functools.reduce(xp.maximum, parts)

    block, inside, scores, log_partition = draw_in_blocks(weights, noise, scores_of, xp=xp)
    slots = inside
    for cache, first in zip(caches, passed, strict=False):
        own = block - first
        mine = (own >= 0) & (own < cache.blocks)
        slots = slots + xp.where(mine, cache.first + own * BLOCK, 0)
    return SoftmaxDraw(slots, scores, log_partition)


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
        found = [
            each.best_of_groups(start, groups, width or size)
            for each, start, size in ((caches[number], *part) for number, *part in stretches)
            if each is not None
        ] or [here[0].no_groups(groups)]
        both = concat_rows(found, xp)
        if len(found) > 1:
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
