"""Streaming retrieval: the cache is scored a tile at a time, and B x C scores never exist.

Of each block of slots only the log-sum-exp of its scores is kept. A draw picks a block by its
weight, scores that block again, and picks a slot inside: exactly softmax sampling, for
B x C / BLOCK numbers of memory. Of each top-k group only the best score and its slot are kept.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from negcache_core.arrays._array import (
    Array,
    arange_like,
    cast,
    concat_rows,
    fill,
    length,
)
from negcache_core.arrays.backend import CPU_TILE, Backend
from negcache_core.arrays.budget import budget_of, itemsize
from negcache_core.arrays.exclusion import Exclusions, Labels
from negcache_core.arrays.numerics import log_sum_exp
from negcache_core.cache.quantized import dequantize, scales_in
from negcache_core.cache.state import NegativeCache, is_written
from negcache_core.cache.window import recent
from negcache_core.retrieval.lowered import Lowered
from negcache_core.retrieval.scorer import Scorer

BLOCK = 128
"""Slots in a block: a draw first picks a block by its weight, then a slot inside."""


UNKNOWN_ROWS = 256
"""Queries assumed where tracing leaves their number open: it sizes tiles, and changes no result."""


def tile_slots(rows: int | None, width: int, itemsize: int, tile_bytes: int) -> int:
    """Return how many slots a tile has: as many whole blocks as fit the budget, at least one.

    A slot takes two numbers for each of `rows` queries, its score and the score's exponential,
    and `width` numbers for its embedding, if that is copied for slicing or to change its dtype.

    >>> tile_slots(64, 0, 4, 2**20)
    2048
    """
    per_slot = itemsize * (2 * max(1, UNKNOWN_ROWS if rows is None else rows) + width)
    return max(BLOCK, tile_bytes // per_slot // BLOCK * BLOCK)


class CacheScores(NamedTuple):
    """The scores of queries (B, D) against one cache, any part of them on demand.

    They are -inf where a slot is empty, or its row must not be the query's negative.

    queries:      already scaled; `scorer` then has no scale. If it has prefixes, these are
                  (B, D + W), and ceilings (B, W).
    first:        the number of this cache's slot 0 among all caches' slots
    tile:         slots to score at a time
    own:          what must not be a negative of each query, or None for nothing
    labels:       (C,) of the rows, which decide that
    bias:         (C,) subtracted from each row's scores, or None
    budget:       bytes for what is in memory at a time
    row_scale:    (C,) of a table of codes, or None
    lowered:      the queries in the table's dtype, on a device that multiplies rows as they are
                  stored; `queries` are then these, raised. None elsewhere
    fused:        whether one kernel computes `block_weights`
    """

    queries: Array
    table: Array
    age: Array
    first: int
    tile: int
    scorer: Scorer
    backend: Backend
    own: Exclusions | None = None
    labels: Labels = Labels()
    bias: Array | None = None
    budget: int = CPU_TILE
    row_scale: Array | None = None
    lowered: Lowered | None = None
    fused: bool = False

    @property
    def slots(self) -> int:
        """The capacity."""
        return int(self.age.shape[0])

    @property
    def blocks(self) -> int:
        """The number of blocks; the last one may be short."""
        return -(-self.slots // BLOCK)

    def matrix(self) -> Array:
        """Score all slots at once: (B, C), for a user's function of the score matrix."""
        return self.scorer.xp.matrix_transpose(self.mask(*self.by_slot(0, self.slots)[:2]))

    def block_weights(self, readout: tuple[Array, ...] = ()) -> tuple[Array, tuple[Array, ...]]:
        """Return the log-sum-exp of every block, (B, blocks), and `readout` including this cache.

        readout: what `join_readouts` made of the caches so far; () if it is not needed
        """
        xp = self.scorer.xp
        if self.fused:
            return self._fused_weights(readout)

        def weigh(
            readout: tuple[Array, ...], start: Any, size: int
        ) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
            scores, written, rows = self.by_slot(start, size)
            short = -size % BLOCK
            if short:
                pad = xp.broadcast_to(fill((1, 1), 0, scores, xp), (short, length(scores, xp, 1)))
                scores = xp.concat([scores, pad], axis=0)
                written = xp.concat([written, fill((short,), value=False, like=written, xp=xp)])
            if not readout:
                return readout, (self.backend.block_log_sum_exp(scores, written, BLOCK),)
            factors = None
            if self.lowered is not None and self.row_scale is not None:
                factors = self.backend.slice_rows(self.row_scale, start, size)
            weights, added, mean = self.backend.read_blocks(scores, rows, written, BLOCK, factors)
            return join_readouts(readout, (added, mean), xp=xp), (weights,)

        readout, (weights,) = self.scan_tiles(weigh, readout, self.slots, self.tile)
        return xp.matrix_transpose(weights), readout

    def _fused_weights(self, readout: tuple[Array, ...]) -> tuple[Array, tuple[Array, ...]]:
        queries, scale = (self.queries, None) if self.lowered is None else self.lowered
        weights, added = self.backend.fused_block_weights(
            queries,
            self.table,
            self.age,
            query_scale=scale,
            row_scale=self.row_scale,
            bias=self.bias,
            labels=self.labels,
            own=self.own,
            block=BLOCK,
            readout=bool(readout),
        )
        if added is None:
            return weights, readout
        return weights, join_readouts(readout, added, xp=self.scorer.xp)

    def of_blocks(self, block: Array) -> Array:
        """Score blocks (B, S) by number again: (B, S, BLOCK); -inf outside the cache."""
        xp, draws = self.scorer.xp, block.shape[1]
        every = block[:, :, None] * BLOCK + arange_like(BLOCK, block, xp)[None, None, :]
        there = (every >= 0) & (every < self.slots)
        flat = xp.reshape(xp.where(there, every, 0), (-1,))
        rows = xp.reshape(self.rows_at(flat), (-1, draws * BLOCK, self.table.shape[1]))
        scores = xp.reshape(self.scorer.by_row(self.queries, rows), (-1, draws, BLOCK))

        def in_blocks(field: Array) -> Any:
            return xp.reshape(xp.take_rows(field, flat), (-1, draws, BLOCK))

        if self.own is not None:
            there = there & self.own.admit(self.labels.each(in_blocks), scores)
        if self.bias is not None:
            scores = scores - in_blocks(self.bias)
        written = is_written(xp.reshape(xp.take_rows(self.age, flat), (-1, draws, BLOCK)))
        return xp.where(there & written, scores, -float("inf"))

    def of_queries(self, rows: Array) -> "CacheScores":
        """Return the scores of some queries, or of all several times, by their rows (n,)."""
        xp = self.scorer.xp
        return self._replace(
            queries=xp.take_rows(self.queries, rows),
            own=None if self.own is None else self.own.of_queries(rows, xp),
            lowered=None if self.lowered is None else self.lowered.of_queries(rows, xp),
        )

    def by_slot(self, start: Any, size: int) -> tuple[Array, Array, Array]:
        """Score slots start … start + size - 1: (size, B); which are written, (size,); their rows.

        Rows are in the dtype to compute in, or as they are stored if the queries are lowered.

        One row of scores for each slot: products with a tall result, and reductions down its
        columns, were measured to be faster. `start` may be a traced integer.
        """
        backend, age = self.backend, self.backend.slice_rows(self.age, start, size)
        if self.lowered is None:
            rows = self.rows(start, size)
            scores = self.scorer.xp.matmul_transposed(rows, self.queries)
            if self.scorer.transform is not None:
                scores = self.scorer.of_products(scores)
        else:
            rows = backend.slice_rows(self.table, start, size)
            scores = self._scores_as_stored(self.lowered, rows, start, size)
        if self.own is not None:
            labels = self.labels.each(lambda field: backend.slice_rows(field, start, size))
            scores = backend.exclude(scores, labels, self.own)
        if self.bias is not None:
            scores = scores - backend.slice_rows(self.bias, start, size)[:, None]
        return scores, is_written(age), rows

    def _scores_as_stored(self, lowered: Lowered, rows: Array, start: Any, size: int) -> Array:
        scores = self.backend.product_as_stored(rows, lowered.queries) * lowered.scale[None, :]
        if self.row_scale is not None:
            scores = scores * self.backend.slice_rows(self.row_scale, start, size)[:, None]
        return self.scorer.of_products(scores)

    def rows(self, start: Any, size: int) -> Array:
        """Return the embeddings of slots start … start + size - 1 in the dtype to compute in."""
        codes = self.backend.slice_rows(self.table, start, size)
        if self.row_scale is not None:
            scale = self.backend.slice_rows(self.row_scale, start, size)
            codes = dequantize(codes, scale, xp=self.scorer.xp)
        return cast(codes, self.scorer.dtype, self.scorer.xp)

    def rows_at(self, slots: Array) -> Array:
        """Return the embeddings at slots (n,) in the dtype to compute in."""
        codes = self.scorer.xp.take_rows(self.table, slots)
        if self.row_scale is not None:
            scale = self.scorer.xp.take_rows(self.row_scale, slots)
            codes = dequantize(codes, scale, xp=self.scorer.xp)
        return cast(codes, self.scorer.dtype, self.scorer.xp)

    def mask(self, scores: Array, written: Array) -> Array:
        """Return `by_slot`'s scores with -inf where a slot is empty."""
        # Scale first, then mask: an infinite score times a scale has no gradient.
        return self.scorer.xp.where(written[:, None], scores, -float("inf"))

    def over_tiles(
        self, function: Callable[[Any, int], tuple[Array, ...]], slots: int, tile: int
    ) -> tuple[Array, ...]:
        """Concatenate function(start, size) over the tiles of a stretch and its remainder."""
        return self.scan_tiles(
            lambda carry, start, size: (carry, function(start, size)), (), slots, tile
        )[1]

    def scan_tiles(
        self,
        function: Callable[[Any, Any, int], tuple[tuple[Array, ...], tuple[Array, ...]]],
        carry: tuple[Array, ...],
        slots: int,
        tile: int,
    ) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        """Do that with function(carry, start, size) -> (carry, parts); return carry and parts."""
        count, rest = divmod(slots, tile)
        by_tile = []
        if count:
            carry, parts = self.backend.scan_tiles(
                lambda carry, at: function(carry, at * tile, tile), carry, count
            )
            by_tile.append(parts)
        if rest:
            carry, parts = function(carry, count * tile, rest)
            by_tile.append(parts)
        return carry, concat_rows(by_tile, self.scorer.xp)


def _lowers(table: Array, scorer: Scorer, backend: Backend, *, fused: bool) -> bool:
    """Return whether queries are rounded to the rows' dtype, for a product of rows as stored."""
    if table.dtype == scorer.dtype or scorer.prefixes is not None:
        return False
    return fused or (scorer.dtype == scorer.xp.float32 and backend.multiplies_as_stored(table))


def empty_readout(queries: Array, *, xp: Any) -> tuple[Array, Array]:
    """Return the readout of zero slots: log-partition (B,) of -inf, and mean embedding (B, D)."""
    zero = xp.zeros_like(queries)
    return xp.sum(zero, axis=1) - float("inf"), zero


def join_readouts(
    readout: tuple[Array, ...], added: tuple[Array, Array], *, xp: Any
) -> tuple[Array, Array]:
    """Return the readout of two sets of slots together: log-partition (B,) and mean (B, D)."""
    parts = xp.concat([readout[0][None, :], added[0][None, :]], axis=0)
    both = log_sum_exp(parts, 0, xp=xp)
    shares = xp.exp(parts - xp.where(both > -float("inf"), both, 0.0)[None, :])
    return both, readout[1] * shares[0, :, None] + added[1] * shares[1, :, None]


def scores_of(
    queries: Array,
    caches: Mapping[str, NegativeCache],
    embedding_key: str,
    scorer: Scorer,
    backend: Backend,
    tile_bytes: int | None,
    *,
    own: Exclusions | None = None,
    id_keys: tuple[str, ...] = (),
    group_key: str | None = None,
    bias_key: str | None = None,
    window: Array | None = None,
    first: int = 0,
    fused: bool = False,
) -> list[CacheScores]:
    """Return the scores of queries (B, D) against each cache, computed on demand.

    own:    what must not be a negative of each query; id_keys and group_key name the fields
    window: the state of the window of ages, None for every age
    first:  the number of the first slot of all
    fused:  whether one kernel weighs blocks
    """
    xp = backend.xp
    number, budget = itemsize(scorer.dtype, xp), budget_of(tile_bytes, queries, backend)
    # The scale goes into the queries: B x D products instead of one per score. Stopped, because a
    # tape that watches the scale would otherwise keep every tile.
    scaled, plain = backend.stop_gradient(scorer.scaled(queries)), scorer._replace(scale=None)
    scores = []
    for cache in caches.values():
        table, age = cache.data[embedding_key], cache.age
        if window is not None:
            age = recent(age, window, xp)
        copied = backend.slices_copy or table.dtype != scorer.dtype
        width = table.shape[1] if copied or scorer.prefixes is not None else 0
        tile = tile_slots(backend.tile_rows(queries), width, number, budget)
        group = None if group_key is None else cache.data[group_key]
        row_scale = None
        if table.dtype == xp.int8:
            row_scale = cache.data[scales_in(cache.data)[embedding_key]]
        lowered, given = None, scaled
        if _lowers(table, scorer, backend, fused=fused):
            lowered = Lowered.of(scaled, table, xp)
            given = lowered.raised(xp)
        labels = Labels(tuple([cache.data[key] for key in id_keys]), group)
        bias = None if bias_key is None else cast(cache.data[bias_key], scorer.dtype, xp)
        scores.append(
            CacheScores(
                given,
                table,
                age,
                first,
                tile,
                plain,
                backend,
                own,
                labels,
                bias,
                budget,
                row_scale,
                lowered,
                fused,
            )
        )
        first += scores[-1].slots
    return scores
