"""Losses as modules: a scale or a transform with variables is tracked by the loss."""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from negcache_core import CacheLoss, CacheLossReturn, OptionError
from negcache_core.losses.classification import CacheClassificationLoss as _CacheClassificationLoss
from negcache_core.sharding.placement import ShardedLoss

from ._backend import TENSORFLOW
from ._replicas import StrategyReplicas

__all__ = [
    "CacheClassificationLoss",
    "CacheLoss",
    "CacheLossReturn",
    "DistributedCacheClassificationLoss",
]


class CacheClassificationLoss(_CacheClassificationLoss, tf.Module):
    """Cross-entropy against the cache; see `negcache_core.CacheClassificationLoss`."""

    backend = TENSORFLOW


class DistributedCacheClassificationLoss(ShardedLoss, tf.Module):
    """Cross-entropy against a cache that is cut into equal shards, one on each replica.

    Make it, and its handler, inside `strategy.scope()`, and call them in `strategy.run`. Replicas
    need batches of one size, known when traced: batch a dataset with drop_remainder=True. A
    generator made from None or a seed gives each replica a stream of its own.

    See `negcache_core.sharding.ShardedLoss`.
    """

    backend = TENSORFLOW

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        strategy = tf.distribute.get_strategy()
        if self.top_k is not None and isinstance(strategy, tf.distribute.TPUStrategy):
            raise OptionError(
                "top_k needs each replica to know while it is traced which one it is, and a TPU's "
                "replicas share one trace: leave top_k out to draw from the softmax over all slots."
            )
        self._replicas = StrategyReplicas(strategy)

    @property
    def replicas(self) -> StrategyReplicas:
        """The replicas of the strategy in whose scope the loss was made."""
        return self._replicas

    def _noise_of_all(self, rows: Sequence[int], like: tf.Tensor) -> tf.Tensor:
        # No two replicas' streams are alike, so each makes its own queries' part.
        own = self.backend.uniform(self.generator, (rows[0], self.num_samples, 2), like)
        return self.replicas.gather([own], rows)[0]
