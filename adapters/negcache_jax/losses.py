"""Losses for JAX: pure functions of their arguments, with a random key among them."""

import copy
from typing import Any

from jax import Array

from negcache_core import CacheLoss, CacheLossReturn, Retrieval
from negcache_core.losses import CacheClassificationLoss as _CacheClassificationLoss

from ._backend import JAX, KeyStream

__all__ = ["CacheClassificationLoss", "CacheLoss", "CacheLossReturn"]


class CacheClassificationLoss(_CacheClassificationLoss):
    """Cross-entropy against the cache; see `negcache_core.CacheClassificationLoss`.

    A call, and `retrieve`, take `key=` for the draw. Pass a trained scale as a function of no
    arguments that closes over it, or make the loss inside the differentiated function.
    """

    backend = JAX

    def with_keys(self, keys: KeyStream) -> "CacheClassificationLoss":
        """Return this loss drawing from `keys`; so does its retrieval function, if it draws."""
        bound = copy.copy(self)
        bound.generator = keys
        if hasattr(self.retrieval_fn, "generator"):
            bound.retrieval_fn = copy.copy(self.retrieval_fn)
            bound.retrieval_fn.generator = keys
        return bound

    def retrieve(self, *arguments: Any, key: Array | None = None, **options: Any) -> Retrieval:
        """Draw negatives: phase one; see `negcache_core`'s method."""
        if key is not None:
            return self.with_keys(KeyStream(key)).retrieve(*arguments, **options)
        return super().retrieve(*arguments, **options)

    def __call__(
        self, *arguments: Any, key: Array | None = None, **options: Any
    ) -> CacheLossReturn:
        """Retrieve, embed and return the loss; see `negcache_core`'s method."""
        if key is not None:
            return self.with_keys(KeyStream(key))(*arguments, **options)
        return super().__call__(*arguments, **options)
