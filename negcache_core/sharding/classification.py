"""The loss on a cache in shards: the same loss, in another place."""

from collections.abc import Callable
from functools import partial
from typing import Any

from negcache_core.errors import OptionError
from negcache_core.losses.classification import CacheClassificationLoss
from negcache_core.sharding.placement import Shards
from negcache_core.sharding.replicas import Replicas

ALIKE = (
    *("embedding_key", "data_keys", "top_k", "estimator", "num_samples", "id_keys"),
    *("group_key", "margin", "in_batch_negatives", "log_frequency_key"),
    *("max_staleness", "staleness_correction", "matryoshka_dims", "matryoshka_weights"),
    "fused",
)
"""The options that all replicas must give alike."""


def _no_replicas(group: Any) -> Replicas:
    raise OptionError(f"there are no replicas in group {group!r}: use an adapter's loss.")


class DistributedCacheClassificationLoss(CacheClassificationLoss):
    """Cross-entropy against a cache that is cut into shards, one on each replica.

    group: the replicas that share the cache, as the framework names them

    Every replica calls it with its own part of the batch, which may be empty, and its own shard.
    With the default reducer the value is a replica's share of the global mean, times the number of
    replicas. Averaged over replicas, as data-parallel training averages gradients, it is the mean
    over the whole batch, even if the parts differ in size. Other reducers see a replica's own
    values.

    The other arguments are those of CacheClassificationLoss.

    Raises OptionError for a `retrieval_fn`, as no replica has the whole score matrix, and in the
    first step if the replicas were not set up alike.
    """

    make_replicas: Callable[[Any], Replicas] = staticmethod(_no_replicas)
    placement: Shards

    def __init__(self, *arguments: Any, group: Any = None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        if self.retrieval_fn is not None:
            raise OptionError(
                "retrieval_fn needs the whole score matrix, but each replica has only that of "
                "its shard: leave it out to draw from the softmax over all shards."
            )
        self.group = group
        self.placement = shards = Shards(partial(self.make_replicas, group))
        shards.facts.update({name: getattr(self, name) for name in ALIKE})

    @property
    def replicas(self) -> Any:
        """The replicas that share the cache."""
        return self.placement.replicas
