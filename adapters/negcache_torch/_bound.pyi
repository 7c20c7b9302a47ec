# What mypy knows of negcache's classes in PyTorch, which `_bound.py` makes at run time.

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

import negcache_core as core
from negcache_core import CacheLossReturn, NegativeCache
from negcache_core.adapter import Array, Bound
from negcache_core.handlers.step import ItemNetwork
from negcache_core.handlers.upkeep import Progress
from negcache_core.sharding import classification as sharding

BOUND: Bound

class CacheManager(core.CacheManager): ...
class IsInCacheFilterFn(core.IsInCacheFilterFn): ...
class MaxScoreRetrievalFn(core.MaxScoreRetrievalFn): ...
class GumbelMaxRetrievalFn(core.GumbelMaxRetrievalFn, nn.Module): ...

class CacheClassificationLoss(core.CacheClassificationLoss, nn.Module):
    def forward(
        self,
        doc_network: Callable[[dict[str, Any]], Array],
        query_embeddings: Array,
        pos_doc_embeddings: Array,
        cache: NegativeCache | Mapping[str, NegativeCache],
        *,
        pos_features: Mapping[str, Array] | None = None,
        positive_ids: Array | Mapping[str, Array] | None = None,
        hard_negative_embeddings: Array | None = None,
        hard_negative_features: Mapping[str, Array] | None = None,
        competing_scores: Array | None = None,
        sample_weight: Array | None = None,
        noise: Array | None = None,
        constant: Iterable[str] = (),
    ) -> CacheLossReturn: ...

class DistributedCacheClassificationLoss(sharding.DistributedCacheClassificationLoss, nn.Module):
    def forward(
        self,
        doc_network: Callable[[dict[str, Any]], Array],
        query_embeddings: Array,
        pos_doc_embeddings: Array,
        cache: NegativeCache | Mapping[str, NegativeCache],
        *,
        pos_features: Mapping[str, Array] | None = None,
        positive_ids: Array | Mapping[str, Array] | None = None,
        hard_negative_embeddings: Array | None = None,
        hard_negative_features: Mapping[str, Array] | None = None,
        competing_scores: Array | None = None,
        sample_weight: Array | None = None,
        noise: Array | None = None,
        constant: Iterable[str] = (),
    ) -> CacheLossReturn: ...

class CacheLossHandler(core.CacheLossHandler, nn.Module):
    def __call__(
        self,
        item_network: ItemNetwork,
        query_embeddings: Array,
        pos_item_embeddings: Array,
        features: Mapping[str, Array],
        *,
        labels: Mapping[str, Array] | None = None,
        training: bool | None = None,
        **options: Any,
    ) -> Tensor: ...
    def forward(
        self,
        item_network: ItemNetwork,
        query_embeddings: Array,
        pos_item_embeddings: Array,
        features: Mapping[str, Array],
        *,
        labels: Mapping[str, Array] | None = None,
        training: bool | None = None,
        **options: Any,
    ) -> Tensor: ...
    def update_cache_and_compute_loss(
        self,
        item_network: ItemNetwork,
        query_embeddings: Array,
        pos_item_embeddings: Array,
        features: Mapping[str, Array],
        *,
        labels: Mapping[str, Array] | None = None,
        training: bool | None = None,
        **options: Any,
    ) -> Tensor: ...
    def refresh(self, item_network: ItemNetwork, n: int) -> Tensor: ...
    def prefill(
        self,
        item_network: ItemNetwork,
        features: Mapping[str, Any],
        batch_size: int,
        *,
        labels: Mapping[str, Any] | None = None,
        progress: Progress | None = None,
    ) -> Tensor: ...
    def evict_nonfinite(self) -> Tensor: ...
    def distributed_state_dict(self) -> dict[str, Tensor]: ...

class MultiCacheLossHandler(core.MultiCacheLossHandler, nn.Module):
    def __call__(
        self,
        item_network: ItemNetwork,
        query_embeddings: Array,
        pos_item_embeddings: Array,
        new_item_embeddings: Mapping[str, Array],
        new_item_features: Mapping[str, Mapping[str, Array]],
        *,
        training: bool | None = None,
        **options: Any,
    ) -> Tensor: ...
    def forward(
        self,
        item_network: ItemNetwork,
        query_embeddings: Array,
        pos_item_embeddings: Array,
        new_item_embeddings: Mapping[str, Array],
        new_item_features: Mapping[str, Mapping[str, Array]],
        *,
        training: bool | None = None,
        **options: Any,
    ) -> Tensor: ...
    def update_cache_and_compute_loss(
        self,
        item_network: ItemNetwork,
        query_embeddings: Array,
        pos_item_embeddings: Array,
        new_item_embeddings: Mapping[str, Array],
        new_item_features: Mapping[str, Mapping[str, Array]],
        *,
        training: bool | None = None,
        **options: Any,
    ) -> Tensor: ...
    def refresh(
        self, item_network: ItemNetwork, n: int, *, cache_name: str | None = None
    ) -> Tensor: ...
    def prefill(
        self,
        item_network: ItemNetwork,
        features: Mapping[str, Mapping[str, Any]],
        batch_size: int,
        *,
        progress: Progress | None = None,
    ) -> Tensor: ...
    def evict_nonfinite(self) -> Tensor: ...
    def distributed_state_dict(self) -> dict[str, Tensor]: ...

class NegativeCacheLoss(core.NegativeCacheLoss, CacheLossHandler): ...

def approximate_top_k_with_indices(scores: Array, k: int) -> tuple[Tensor, Tensor]: ...
def in_chunks(network: Callable[[Any], Array], size: int) -> Callable[[Any], Tensor]: ...
