"""The streaming pass for matryoshka embeddings: the scores of all widths, tile by tile."""

from typing import Any

from negcache_core.arrays._array import (
    Array,
    arange_like,
    fill,
    length,
    take_columns,
)
from negcache_core.arrays.exclusion import Exclusions
from negcache_core.cache.state import is_written
from negcache_core.retrieval import prefixes as matryoshka
from negcache_core.retrieval.prefixes import Prefixes
from negcache_core.retrieval.tiled_scores import BLOCK, CacheScores, join_readouts


def weigh_blocks_by_width(
    cache: CacheScores, prefixes: Prefixes, readout: tuple[Array, ...] = ()
) -> tuple[list[Array], tuple[Array, ...]]:
    """Return the log-sum-exp of every block, (B, blocks), at each width, and the readout.

    readout: as in CacheScores.block_weights, but at the last width: (B,) and (B, w)
    """
    backend, xp = cache.backend, cache.scorer.xp

    def weigh(
        readout: tuple[Array, ...], start: Any, size: int
    ) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        # Inside the loop: torch.compile does not take two views of one tensor into it.
        queries, factors = matryoshka.parted(cache.queries, prefixes)
        rows = cache.rows(start, size)
        written = is_written(backend.slice_rows(cache.age, start, size))
        labels = cache.labels.each(lambda field: backend.slice_rows(field, start, size))
        bias: Any = None if cache.bias is None else backend.slice_rows(cache.bias, start, size)
        inverse = matryoshka.inverse_lengths(rows, prefixes, xp)
        short, products, found = -size % BLOCK, None, []
        if short:
            none = fill((short,), value=False, like=written, xp=xp)
            written = xp.concat([written, none], axis=0)
        for place, begin, end in prefixes.segments():
            part: Any = xp.matmul_transposed(rows[:, begin:end], queries[:, begin:end])
            if products is not None:
                part += products  # in place, where a library's arrays can change
            products = part
            scores = products * inverse[:, place][:, None]
            scores *= factors[:, place][None, :]
            if cache.own is not None:
                scores = backend.exclude(scores, labels, at_width(cache.own, place))
            if bias is not None:
                scores = scores - bias[:, None]
            if short:
                pad = xp.broadcast_to(fill((1, 1), 0, scores, xp), (short, length(scores, xp, 1)))
                scores = xp.concat([scores, pad], axis=0)
            if readout and place == prefixes.number - 1:
                weights, *added = backend.read_blocks(
                    scores, rows[:, :end], written, BLOCK, inverse[:, place]
                )
                readout = join_readouts(readout, (added[0], added[1]), xp=xp)
            else:
                weights = backend.block_log_sum_exp(scores, written, BLOCK)
            found.append(weights)
        return readout, tuple(found)

    readout, weights = cache.scan_tiles(weigh, readout, cache.slots, cache.tile)
    return [xp.matrix_transpose(part) for part in weights], readout


def score_blocks_at_width(
    cache: CacheScores, prefixes: Prefixes, block: Array, width: Array
) -> Array:
    """Score blocks (B, S) as CacheScores.of_blocks does, each at its own width, (B, S) by index."""
    xp, draws = cache.scorer.xp, block.shape[1]
    every = block[:, :, None] * BLOCK + arange_like(BLOCK, block, xp)[None, None, :]
    there = (every >= 0) & (every < cache.slots)
    flat = xp.reshape(xp.where(there, every, 0), (-1,))
    rows = xp.reshape(cache.rows_at(flat), (-1, draws * BLOCK, cache.table.shape[1]))
    scores: Any = None
    for place, part in enumerate(matryoshka.by_row(cache.queries, rows, prefixes, xp)):
        part_ = xp.reshape(part, (-1, draws, BLOCK))
        scores = part_ if scores is None else xp.where(width[:, :, None] == place, part_, scores)

    def in_blocks(field: Array) -> Any:
        return xp.reshape(xp.take_rows(field, flat), (-1, draws, BLOCK))

    if cache.own is not None:
        ceiling = cache.own.ceiling
        if ceiling is not None:
            there = there & ~(scores > take_columns(ceiling, width, xp)[:, :, None])
        admitted = cache.own._replace(ceiling=None).admit(cache.labels.each(in_blocks), None)
        there = there if admitted is None else there & admitted
    if cache.bias is not None:
        scores = scores - in_blocks(cache.bias)
    written = is_written(xp.reshape(xp.take_rows(cache.age, flat), (-1, draws, BLOCK)))
    return xp.where(there & written, scores, -float("inf"))


def at_width(own: Exclusions, place: int) -> Exclusions:
    """Return what must not be a negative of each query at one width, from ceilings (B, W)."""
    return own if own.ceiling is None else own._replace(ceiling=own.ceiling[:, place])
