"""The same over many devices: each holds a shard of the cache and a part of the batch.

The softmax and the loss equal those of one big cache and the whole batch.
"""

from negcache_core.sharding.classification import DistributedCacheClassificationLoss
from negcache_core.sharding.replicas import Replicas

__all__ = ["DistributedCacheClassificationLoss", "Replicas"]
