# What mypy knows of negcache's classes in JAX, which `_bound.py` makes at run time.

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self

import jax
from jax.sharding import Mesh

import negcache_core as core
from negcache_core import CacheLossReturn, NegativeCache, Retrieval
from negcache_core.adapter import Array, Bound
from negcache_core.handlers.step import ItemNetwork
from negcache_core.handlers.upkeep import Progress
from negcache_core.sharding import classification as sharding

from ._backend import KeyStream
from ._store import HandlerState

BOUND: Bound

class CacheManager(core.CacheManager): ...
class IsInCacheFilterFn(core.IsInCacheFilterFn): ...
class MaxScoreRetrievalFn(core.MaxScoreRetrievalFn): ...
class GumbelMaxRetrievalFn(core.GumbelMaxRetrievalFn): ...

class CacheClassificationLoss(core.CacheClassificationLoss):
    def with_keys(self, keys: KeyStream) -> Self: ...
    def retrieve(
        self,
        query_embeddings: Array,
        cache: NegativeCache | Mapping[str, NegativeCache],
        *,
        pos_features: Mapping[str, Array] | None = None,
        positive_ids: Array | Mapping[str, Array] | None = None,
        pos_doc_embeddings: Array | None = None,
        noise: Array | None = None,
        key: jax.Array | None = None,
    ) -> Retrieval: ...
    def __call__(
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
        key: jax.Array | None = None,
    ) -> CacheLossReturn: ...

class DistributedCacheClassificationLoss(sharding.DistributedCacheClassificationLoss):
    def __init__(
        self, *arguments: Any, group: str | tuple[str, ...] = "data", **options: Any
    ) -> None: ...
    def with_keys(self, keys: KeyStream) -> Self: ...
    def retrieve(
        self,
        query_embeddings: Array,
        cache: NegativeCache | Mapping[str, NegativeCache],
        *,
        pos_features: Mapping[str, Array] | None = None,
        positive_ids: Array | Mapping[str, Array] | None = None,
        pos_doc_embeddings: Array | None = None,
        noise: Array | None = None,
        key: jax.Array | None = None,
    ) -> Retrieval: ...
    def __call__(
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
        key: jax.Array | None = None,
    ) -> CacheLossReturn: ...

# What `bind` returns: handlers that hold a state, with the core's methods.
class _HoldingOne(core.CacheLossHandler):
    @property
    def state(self) -> HandlerState: ...

class _HoldingMany(core.MultiCacheLossHandler):
    @property
    def state(self) -> HandlerState: ...

class CacheLossHandler(core.CacheLossHandler):
    def init(self, key: jax.Array) -> HandlerState: ...
    def specs(self) -> HandlerState: ...
    def shardings(self, mesh: Mesh) -> HandlerState: ...
    def bind(self, state: HandlerState) -> _HoldingOne: ...
    def __call__(
        self,
        state: HandlerState,
        item_network: ItemNetwork,
        query_embeddings: Array,
        pos_item_embeddings: Array,
        features: Mapping[str, Array],
        *,
        labels: Mapping[str, Array] | None = None,
        training: bool | None = None,
        **options: Any,
    ) -> tuple[jax.Array, HandlerState]: ...
    def update_cache_and_compute_loss(  # type: ignore[override] # the state is explicit
        self,
        state: HandlerState,
        item_network: ItemNetwork,
        query_embeddings: Array,
        pos_item_embeddings: Array,
        features: Mapping[str, Array],
        *,
        labels: Mapping[str, Array] | None = None,
        training: bool | None = None,
        **options: Any,
    ) -> tuple[jax.Array, HandlerState]: ...
    def evaluate(  # type: ignore[override]
        self,
        state: HandlerState,
        item_network: ItemNetwork | None,
        query_embeddings: Array,
        pos_item_embeddings: Array,
        features: Mapping[str, Array],
        *,
        labels: Mapping[str, Array] | None = None,
        **options: Any,
    ) -> CacheLossReturn: ...
    def refresh(  # type: ignore[override]
        self, state: HandlerState, item_network: ItemNetwork, n: int
    ) -> HandlerState: ...
    def prefill(  # type: ignore[override]
        self,
        state: HandlerState,
        item_network: ItemNetwork,
        features: Mapping[str, Any],
        batch_size: int,
        *,
        labels: Mapping[str, Any] | None = None,
        progress: Progress | None = None,
    ) -> HandlerState: ...
    def save(  # type: ignore[override]
        self, state: HandlerState, path: str | os.PathLike[str]
    ) -> None: ...
    def load(  # type: ignore[override]
        self,
        state: HandlerState,
        path: str | os.PathLike[str],
        *,
        resize: bool = False,
        draws: bool = True,
    ) -> HandlerState: ...
    def restore(  # type: ignore[override]
        self,
        state: HandlerState,
        cache: NegativeCache | Mapping[str, NegativeCache],
        *,
        resize: bool = False,
    ) -> HandlerState: ...
    def evict_nonfinite(self, state: HandlerState) -> HandlerState: ...  # type: ignore[override]
    def diagnose(  # type: ignore[override]
        self, state: HandlerState, metrics: Mapping[str, Any] | None = None
    ) -> list[str]: ...
    def resize(  # type: ignore[override]
        self, state: HandlerState, cache_size: int | Mapping[str, int]
    ) -> HandlerState: ...
    def reset(self, state: HandlerState) -> HandlerState: ...  # type: ignore[override]

class MultiCacheLossHandler(core.MultiCacheLossHandler):
    def init(self, key: jax.Array) -> HandlerState: ...
    def specs(self) -> HandlerState: ...
    def shardings(self, mesh: Mesh) -> HandlerState: ...
    def bind(self, state: HandlerState) -> _HoldingMany: ...
    def __call__(
        self,
        state: HandlerState,
        item_network: ItemNetwork,
        query_embeddings: Array,
        pos_item_embeddings: Array,
        new_item_embeddings: Mapping[str, Array],
        new_item_features: Mapping[str, Mapping[str, Array]],
        *,
        training: bool | None = None,
        **options: Any,
    ) -> tuple[jax.Array, HandlerState]: ...
    def update_cache_and_compute_loss(  # type: ignore[override] # the state is explicit
        self,
        state: HandlerState,
        item_network: ItemNetwork,
        query_embeddings: Array,
        pos_item_embeddings: Array,
        new_item_embeddings: Mapping[str, Array],
        new_item_features: Mapping[str, Mapping[str, Array]],
        *,
        training: bool | None = None,
        **options: Any,
    ) -> tuple[jax.Array, HandlerState]: ...
    def evaluate(  # type: ignore[override]
        self,
        state: HandlerState,
        item_network: ItemNetwork | None,
        query_embeddings: Array,
        pos_item_embeddings: Array,
        new_item_features: Mapping[str, Mapping[str, Array]],
        **options: Any,
    ) -> CacheLossReturn: ...
    def refresh(  # type: ignore[override]
        self,
        state: HandlerState,
        item_network: ItemNetwork,
        n: int,
        *,
        cache_name: str | None = None,
    ) -> HandlerState: ...
    def prefill(  # type: ignore[override]
        self,
        state: HandlerState,
        item_network: ItemNetwork,
        features: Mapping[str, Mapping[str, Any]],
        batch_size: int,
        *,
        progress: Progress | None = None,
    ) -> HandlerState: ...
    def save(  # type: ignore[override]
        self, state: HandlerState, path: str | os.PathLike[str]
    ) -> None: ...
    def load(  # type: ignore[override]
        self,
        state: HandlerState,
        path: str | os.PathLike[str],
        *,
        resize: bool = False,
        draws: bool = True,
    ) -> HandlerState: ...
    def restore(  # type: ignore[override]
        self,
        state: HandlerState,
        cache: NegativeCache | Mapping[str, NegativeCache],
        *,
        resize: bool = False,
    ) -> HandlerState: ...
    def evict_nonfinite(self, state: HandlerState) -> HandlerState: ...  # type: ignore[override]
    def diagnose(  # type: ignore[override]
        self, state: HandlerState, metrics: Mapping[str, Any] | None = None
    ) -> list[str]: ...
    def resize(  # type: ignore[override]
        self, state: HandlerState, cache_size: int | Mapping[str, int]
    ) -> HandlerState: ...
    def reset(self, state: HandlerState) -> HandlerState: ...  # type: ignore[override]

class NegativeCacheLoss(core.NegativeCacheLoss, CacheLossHandler): ...

def approximate_top_k_with_indices(scores: Array, k: int) -> tuple[jax.Array, jax.Array]: ...
def in_chunks(network: Callable[[Any], Array], size: int) -> Callable[[Any], jax.Array]: ...
