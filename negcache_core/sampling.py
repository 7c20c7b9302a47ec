"""Drawing negatives: exact softmax sampling, and functions of the score matrix."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

from negcache_core._array import (
    Array,
    cast,
    fill,
    index_dtype,
    length,
    namespace,
    positions,
    take,
    take_columns,
)
from negcache_core.arguments import (
    array_of,
    check_device,
    check_floating,
    check_number,
    shape_of,
)
from negcache_core.backend import NUMPY, Backend
from negcache_core.errors import CapacityError
from negcache_core.scoring import log_sum_exp

BLOCK = 128
"""Slots in a block: a draw first picks a block by its weight, then a slot inside."""


def inverse_cdf(log_weights: Array, uniforms: Array, *, xp: Any = None) -> Array:
    """Map uniforms to positions: the softmax law, by the inverse of its distribution function.

    log_weights: (B, n); uniforms: (B, S) in [0, 1). Returns (B, S) positions.
    A weight of exp(-inf) is never drawn, whatever rounding does to the sums; where every weight of
    a row is zero the position means nothing.

    >>> import numpy as np
    >>> inverse_cdf(np.log([[0.25, 0.5, 0.25]]), np.asarray([[0.0, 0.3, 0.74, 0.76]]))
    array([[0, 1, 1, 2]])
    """
    xp = namespace(log_weights, uniforms, xp=xp)
    top = xp.max(log_weights, axis=-1, keepdims=True)
    cdf = xp.cumulative_sum(xp.exp(log_weights - xp.where(top > -float("inf"), top, 0.0)), axis=-1)
    target = uniforms * cdf[:, -1:]
    index_of = index_dtype(xp)
    below = xp.sum(cast(cdf[:, None, :] <= target[:, :, None], index_of, xp), axis=-1)
    # Where rounding makes the target the whole sum, the last position with any weight is meant.
    last = xp.sum(cast(cdf < cdf[:, -1:], index_of, xp), axis=-1)
    return xp.minimum(below, last[:, None])


def draw_from_softmax(scores: Array, noise: Array, *, xp: Any = None) -> tuple[Array, Array]:
    """Draw from softmax(scores), independently and with replacement.

    scores: (B, C), -inf where a slot must not be drawn
    noise:  (B, S, 2) uniforms in [0, 1): the first picks a block of slots, the second a slot in it

    Returns positions (B, S), and the log-partition (B,): log-sum-exp of each row, -inf where
    nothing can be drawn (its positions then mean nothing).
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
        chosen = take(xp.reshape(scores, (-1, BLOCK)), numbers, xp)
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
    inside, chosen = (xp.reshape(each, (-1, draws)) for each in (inside, chosen))
    return block, inside, chosen, log_sum_exp(weights, xp=xp)


def scores_matrix(scores: Any, backend: Backend) -> Array:
    """Return scores as a floating array (B, C) with at least one column, or raise."""
    scores = check_floating(array_of(scores, ("B", "C"), "scores", backend), "scores")
    if scores.shape[1] == 0:
        raise CapacityError(f"scores has shape {tuple(scores.shape)}: there is no slot to choose.")
    return scores


class AbstractRetrievalFn(ABC):
    """A function of the score matrix: scores (B, C) -> slots (B, 1) or (B, S)."""

    backend: ClassVar[Backend] = NUMPY

    @abstractmethod
    def __call__(self, scores: Array) -> Array:
        """Choose slots for each query. Slots that must not be used score -inf."""


class MaxScoreRetrievalFn(AbstractRetrievalFn):
    """Always take the highest score: the hardest negative. Biased: no estimate of cross-entropy.

    >>> import numpy as np
    >>> MaxScoreRetrievalFn()(np.asarray([[1.0, 2.0, 0.0]]))
    array([[1]])
    """

    def __call__(self, scores: Array) -> Array:
        """Return (B, 1): the first slot of the highest score."""
        scores = scores_matrix(scores, self.backend)
        return self.backend.xp.argmax(scores, axis=1)[:, None]


class GumbelMaxRetrievalFn(AbstractRetrievalFn):
    """Sample from softmax(inv_temp * scores) by adding Gumbel noise to every score.

    inv_temp:  1 for an unbiased estimate; more draws harder negatives, less easier ones
    generator: None, an int seed, or a generator of the framework

    This is the published default. Leaving `retrieval_fn` unset draws from the same law at
    inv_temp=1 with two random numbers per draw instead of one per slot. Noise comes from 53-bit
    uniforms: a 23-bit one would cut the Gumbel tail at 15.9.

    >>> import numpy as np
    >>> fn = GumbelMaxRetrievalFn(inv_temp=0.5)
    >>> fn(np.asarray([[1.0, 0.0, 0.0]]), noise=np.asarray([[0.0, 0.9, 0.0]]))
    array([[1]])
    """

    def __init__(self, inv_temp: float = 1.0, *, generator: Any = None) -> None:
        super().__init__()
        check_number(inv_temp, "inv_temp")
        self.inv_temp = inv_temp
        self.generator = self.backend.make_generator(generator)

    def __call__(self, scores: Array, noise: Array | None = None) -> Array:
        """Return (B, 1) slots; `noise` (B, C) are Gumbel variates, drawn where it is None."""
        xp, scores = self.backend.xp, scores_matrix(scores, self.backend)
        if noise is not None:
            noise = check_floating(
                array_of(noise, shape_of(scores, "scores"), "noise", self.backend), "noise"
            )
            check_device(noise, scores, "noise", self.backend)
        else:
            shape = (length(scores, xp), length(scores, xp, 1))
            noise = gumbel(self.backend.uniform(self.generator, shape, scores), xp=xp)
        return xp.argmax(self.inv_temp * scores + cast(noise, scores.dtype, xp), axis=1)[:, None]


def gumbel(uniforms: Array, *, xp: Any = None) -> Array:
    """Return standard Gumbel variates from uniforms in [0, 1)."""
    xp = namespace(uniforms, xp=xp)
    tiny = 1e-300 if uniforms.dtype == xp.float64 else 1e-37
    return -xp.log(-xp.log(xp.maximum(uniforms, tiny)))
