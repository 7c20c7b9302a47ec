# What mypy knows of negcache's classes in TensorFlow, which `_bound.py` makes at run time.
# TensorFlow ships no types: its tensors are Any, and so is what a method returns of them.

from collections.abc import Callable, Mapping
from typing import Any

import tensorflow as tf

import negcache_core as core
from negcache_core.adapter import Bound
from negcache_core.handlers.step import ItemNetwork
from negcache_core.handlers.upkeep import Progress
from negcache_core.sharding import classification as sharding

BOUND: Bound

class CacheManager(core.CacheManager): ...
class IsInCacheFilterFn(core.IsInCacheFilterFn): ...
class MaxScoreRetrievalFn(core.MaxScoreRetrievalFn): ...
class GumbelMaxRetrievalFn(core.GumbelMaxRetrievalFn, tf.Module): ...
class CacheClassificationLoss(core.CacheClassificationLoss, tf.Module): ...
class DistributedCacheClassificationLoss(
    sharding.DistributedCacheClassificationLoss, tf.Module
): ...

class CacheLossHandler(core.CacheLossHandler, tf.Module):
    def update_cache_and_compute_loss(
        self,
        item_network: ItemNetwork,
        query_embeddings: Any,
        pos_item_embeddings: Any,
        features: Mapping[str, Any],
        *,
        labels: Mapping[str, Any] | None = None,
        training: bool | None = None,
        **options: Any,
    ) -> Any: ...
    def refresh(self, item_network: ItemNetwork, n: int) -> Any: ...
    def prefill(
        self,
        item_network: ItemNetwork,
        features: Mapping[str, Any],
        batch_size: int,
        *,
        labels: Mapping[str, Any] | None = None,
        progress: Progress | None = None,
    ) -> Any: ...
    def evict_nonfinite(self) -> Any: ...

class MultiCacheLossHandler(core.MultiCacheLossHandler, tf.Module):
    def update_cache_and_compute_loss(
        self,
        item_network: ItemNetwork,
        query_embeddings: Any,
        pos_item_embeddings: Any,
        new_item_embeddings: Mapping[str, Any],
        new_item_features: Mapping[str, Mapping[str, Any]],
        *,
        training: bool | None = None,
        **options: Any,
    ) -> Any: ...
    def refresh(
        self, item_network: ItemNetwork, n: int, *, cache_name: str | None = None
    ) -> Any: ...
    def prefill(
        self,
        item_network: ItemNetwork,
        features: Mapping[str, Mapping[str, Any]],
        batch_size: int,
        *,
        progress: Progress | None = None,
    ) -> Any: ...
    def evict_nonfinite(self) -> Any: ...

class NegativeCacheLoss(core.NegativeCacheLoss, CacheLossHandler): ...

def approximate_top_k_with_indices(scores: Any, k: int) -> tuple[Any, Any]: ...
def in_chunks(network: Callable[[Any], Any], size: int) -> Callable[[Any], Any]: ...
