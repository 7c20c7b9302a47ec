"""Functions of the score matrix that choose negatives, and the check of a user's own."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from negcache_core.arrays._array import Array, cast, dtype_kind, length, namespace
from negcache_core.arrays.backend import NUMPY, Backend
from negcache_core.arrays.validation import (
    array_of,
    as_array,
    check_device,
    check_floating,
    check_number,
    shape_of,
)
from negcache_core.errors import CapacityError, OptionError


def scores_matrix(scores: Any, backend: Backend) -> Array:
    """Return scores as a floating array (B, C) with at least one column, or raise."""
    scores = check_floating(array_of(scores, ("B", "C"), "scores", backend), "scores")
    if scores.shape[1] == 0:
        raise CapacityError(f"scores has shape {tuple(scores.shape)}: there is no slot to choose.")
    return scores


class AbstractRetrievalFn(ABC):
    """A function of the score matrix: scores (B, C) -> slots (B, 1) or (B, S). Subclass it.

    Implement `__call__(scores)`. Slots that must not be used score -inf. Give an instance to a
    CacheClassificationLoss as `retrieval_fn=`.
    """

    backend: ClassVar[Backend] = NUMPY

    @abstractmethod
    def __call__(self, scores: Any) -> Array:
        """Choose slots for each query. Slots that must not be used score -inf."""


class MaxScoreRetrievalFn(AbstractRetrievalFn):
    """Take the highest score, the hardest negative. Biased as an estimate of cross-entropy.

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

    inv_temp:  1 for an unbiased estimate; above 1 draws harder negatives, below 1 easier ones
    generator: None, an int seed, or a random generator of the framework

    This is the published default. Without any `retrieval_fn`, a loss draws from the same
    distribution at inv_temp=1, with two random numbers per draw instead of one per slot. Noise
    comes from 53-bit uniforms: 23-bit ones would cut the tail of the Gumbel distribution at 15.9.

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


def choice(chosen: Any, rows: Any, backend: Backend) -> Array:
    """Check what a user's retrieval function returned, and return it as (B, S) integers."""
    xp = backend.xp
    chosen = as_array(chosen, "what retrieval_fn returned", backend)
    if len(chosen.shape) == 1:
        chosen = chosen[:, None]
    sized = len(chosen.shape) == 2 and (rows in (None, chosen.shape[0]) or chosen.shape[0] is None)
    if not sized or chosen.shape[1] == 0 or dtype_kind(chosen.dtype) != "integer":
        raise OptionError(
            f"retrieval_fn returned shape {tuple(chosen.shape)} and dtype {chosen.dtype} for "
            f"{rows} queries: expected integer slots of shape (B, 1), or (B, S) for S draws each."
        )
    return cast(chosen, xp.index_dtype, xp)
