"""Exact softmax sampling: a block by its weight, then a slot inside by its score."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from negcache_core.arrays._array import (
    Array,
    cast,
    fill,
    length,
    namespace,
    positions,
    take_columns,
)
from negcache_core.arrays.budget import rows_at_a_time
from negcache_core.arrays.numerics import log_sum_exp
from negcache_core.retrieval.prefix_scores import score_blocks_at_width, weigh_blocks_by_width
from negcache_core.retrieval.prefixes import beside, log_drawable, of_parts
from negcache_core.retrieval.tiled_scores import BLOCK, CacheScores, empty_readout


def inverse_cdf(log_weights: Array, uniforms: Array, *, xp: Any = None) -> Array:
    """Map uniforms to positions: softmax sampling, by the inverse of the distribution function.

    log_weights: (B, n); uniforms: (B, S) in [0, 1). Returns (B, S) positions.
    A weight of exp(-inf) is never drawn, whatever rounding does to the sums; if every weight of
    a row is zero, the position is meaningless.

    >>> import numpy as np
    >>> inverse_cdf(np.log([[0.25, 0.5, 0.25]]), np.asarray([[0.0, 0.3, 0.74, 0.76]]))
    array([[0, 1, 1, 2]])
    """
    xp = namespace(log_weights, uniforms, xp=xp)
    top = xp.max(log_weights, axis=-1, keepdims=True)
    cdf = xp.cumulative_sum(xp.exp(log_weights - xp.where(top > -float("inf"), top, 0.0)), axis=-1)
    target = uniforms * cdf[:, -1:]
    index_of = xp.index_dtype
    below = xp.sum(cast(cdf[:, None, :] <= target[:, :, None], index_of, xp), axis=-1)
    # If rounding makes the target the whole sum, take the last position with any weight.
    last = xp.sum(cast(cdf < cdf[:, -1:], index_of, xp), axis=-1)
    return xp.minimum(below, last[:, None])


def draw_from_softmax(scores: Array, noise: Array, *, xp: Any = None) -> tuple[Array, Array]:
    """Draw from softmax(scores), independently and with replacement.

    scores: (B, C), -inf where a slot must not be drawn
    noise:  (B, S, 2) uniforms in [0, 1): the first picks a block of slots, the second a slot in it

    Returns positions (B, S), and the log-partition (B,): log-sum-exp of each row, -inf where
    nothing can be drawn (its positions are then meaningless).
    Differs from the 2021 code, which adds Gumbel noise to every score.
    """
    xp = namespace(scores, noise, xp=xp)
    rows, slots = length(scores, xp), scores.shape[1]
    blocks = -(-slots // BLOCK)
    padding = blocks * BLOCK - slots
    if padding:
        pad = xp.broadcast_to(fill((1, 1), -float("inf"), scores, xp), (rows, padding))
        scores = xp.concat([scores, pad], axis=1)
    weights = log_sum_exp(xp.reshape(scores, (-1, blocks, BLOCK)), xp=xp)
    first = positions(scores, xp)[:, None] * blocks

    def scores_of(block: Array) -> Array:
        numbers = xp.reshape(first + block, (-1,))
        chosen = xp.take_rows(xp.reshape(scores, (-1, BLOCK)), numbers)
        return xp.reshape(chosen, (-1, block.shape[1], BLOCK))

    block, inside, _, log_partition = draw_in_blocks(weights, noise, scores_of, xp=xp)
    return block * BLOCK + inside, log_partition


def draw_in_blocks(
    weights: Array, noise: Array, scores_of: Callable[[Array], Array], *, xp: Any
) -> tuple[Array, Array, Array, Array]:
    """Draw a block by its weight, then a slot inside by its score.

    weights:   (B, n) log-sum-exp of each block's scores; noise: (B, S, 2) uniforms in [0, 1)
    scores_of: blocks (B, S), by number -> their scores (B, S, BLOCK)

    Returns the block, the place in it and its score, (B, S) each; and the log-partition (B,).
    """
    noise = cast(noise, weights.dtype, xp)
    block = inverse_cdf(weights, noise[:, :, 0], xp=xp)
    draws = block.shape[1]
    flat = xp.reshape(scores_of(block), (-1, BLOCK))
    inside = inverse_cdf(flat, xp.reshape(noise[:, :, 1], (-1, 1)), xp=xp)
    chosen = take_columns(flat, inside, xp)
    inside, chosen = xp.reshape(inside, (-1, draws)), xp.reshape(chosen, (-1, draws))
    return block, inside, chosen, log_sum_exp(weights, xp=xp)


class SoftmaxDraw(NamedTuple):
    """What was drawn from the softmax over the written slots of all caches.

    slots (B, S), numbered over all caches, and their scores (B, S); log_partition (B,), -inf for no
    slot; readout (B, D), the mean of all embeddings under the softmax, if requested

    With prefixes a query draws from the mixture of its softmaxes at all widths: log_partition is
    (B, W), each score is the log of the slot's probability at the width by which it was drawn, and
    the readout (B, w) is for the last width.
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
    """Return the log-sum-exp of every block of all caches, (B, blocks), and the readout (B, D).

    With prefixes these are (B, W, blocks) and (B, w).
    """
    xp, prefixes, parts = caches[0].scorer.xp, caches[0].scorer.prefixes, []
    mean: tuple[Array, ...] = ()
    if prefixes is not None:
        if readout:
            mean = empty_readout(caches[0].queries[:, : prefixes.widest], xp=xp)
        for cache in caches:
            by_width, mean = weigh_blocks_by_width(cache, prefixes, mean)
            parts.append(beside(by_width, xp))
        return xp.concat(parts, axis=2), mean[1] if readout else None
    if readout:
        mean = empty_readout(caches[0].queries, xp=xp)
    for cache in caches:
        part, mean = cache.block_weights(mean)
        parts.append(part)
    return xp.concat(parts, axis=1), mean[1] if readout else None


def draw_given_blocks(
    caches: Sequence[CacheScores],
    weights: Array,
    noise: Array,
    log_partition: Array | None = None,
) -> SoftmaxDraw:
    """Draw as `draw_from_caches` does, from the result of `weigh_blocks`, or from rows of it.

    log_partition: with prefixes, (B, W) of everything, if these caches are only a part
    """
    xp, prefixes = caches[0].scorer.xp, caches[0].scorer.prefixes
    passed = list(itertools.accumulate([cache.blocks for cache in caches], initial=0))
    by_width: Any = log_partition
    if prefixes is not None:  # first draw a block at a width
        by_width = log_sum_exp(weights, xp=xp) if by_width is None else by_width
        lowered = of_parts(by_width, prefixes, xp)[:, :, None]
        # By block, then by width, so that shards of a cache draw as the whole cache does.
        weights = xp.matrix_transpose(weights - lowered)
        weights = xp.reshape(weights, (-1, passed[-1] * prefixes.number))

    def scores_of(block: Array, caches: Sequence[CacheScores] = caches) -> Array:
        # Each block is in one cache, and scores -inf in the others.
        if prefixes is not None:
            place, width = block // prefixes.number, block % prefixes.number
            parts = [
                score_blocks_at_width(cache, prefixes, place - first, width)
                for cache, first in zip(caches, passed, strict=False)
            ]
        else:
            parts = [
                cache.of_blocks(block - first) for cache, first in zip(caches, passed, strict=False)
            ]
        return functools.reduce(xp.maximum, parts)

    def scores_by_chunk(block: Array) -> Array:
        def some(rows: Array, block: Array) -> Array:
            return scores_of(block, [cache.of_queries(rows) for cache in caches])

        return one.backend.map_chunks(some, [positions(block, xp), block], size)

    one = caches[0]  # the other caches have rows of the same width
    numbers = noise.shape[1] * BLOCK * one.table.shape[1]
    rows = one.backend.tile_rows(one.queries)
    size: Any = rows_at_a_time(rows, numbers, one.scorer.dtype, one.budget, xp)

    block, inside, scores, log_partition = draw_in_blocks(
        weights, noise, scores_of if size is None else scores_by_chunk, xp=xp
    )
    if prefixes is not None:
        log_partition = by_width
        scores = scores - take_columns(by_width, block % prefixes.number, xp)
        drawable = xp.isfinite(log_drawable(by_width, prefixes, xp))
        scores = xp.where(drawable[:, None], scores, -float("inf"))
        block = block // prefixes.number
    slots = inside
    for cache, first in zip(caches, passed, strict=False):
        own = block - first
        mine = (own >= 0) & (own < cache.blocks)
        slots = slots + xp.where(mine, cache.first + own * BLOCK, 0)
    return SoftmaxDraw(slots, scores, log_partition)
