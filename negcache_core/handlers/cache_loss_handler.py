"""Handlers: hold the state of a cache, or of several, and run training steps on it."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from negcache_core.arrays._array import Array
from negcache_core.arrays.validation import check_keys, check_mapping
from negcache_core.cache.manager import CacheManager
from negcache_core.cache.named import SINGLE
from negcache_core.cache.state import NegativeCache
from negcache_core.errors import KindError
from negcache_core.handlers.upkeep import ItemNetwork, Progress, Upkeep
from negcache_core.losses.classification import CacheClassificationLoss
from negcache_core.losses.results import CacheLossReturn
from negcache_core.retrieval.result import Retrieval


class CacheLossHandler(Upkeep):
    """One cache, its loss, and the step that uses and updates them.

    cache_manager:     a CacheManager; its specs are embedding_key, data_keys, and any more fields
                       that the filter needs
    cache_loss:        a CacheClassificationLoss, or any function (doc_network, query_embeddings,
                       pos_doc_embeddings, cache) -> CacheLossReturn
    embedding_key:     the field of item embeddings
    data_keys:         the fields that the item network takes
    use_cross_replica: every replica writes the rows of all, so that their caches stay equal
    new_items_filter:  which items may enter, such as IsInCacheFilterFn(keys); all by default
    group:             the replicas that share the cache; None for all

    `cache` is the live state, `metrics` the last step's scalars; `prefill` and `refresh` keep the
    cache up beside the steps. Source: the paper, algorithm 2, and the published
    `handlers.CacheLossHandler`, which has no filter and returns another loss.

    >>> import numpy as np
    >>> from negcache_core import CacheClassificationLoss, CacheManager, FieldSpec
    >>> specs = {"x": FieldSpec((2,), "float32"), "embedding": FieldSpec((2,), "float32")}
    >>> handler = CacheLossHandler(
    ...     CacheManager(specs, cache_size=4), CacheClassificationLoss("embedding", ("x",)),
    ...     embedding_key="embedding", data_keys=("x",))
    >>> x = np.eye(2, dtype=np.float32)
    >>> network = lambda features: features["x"]
    >>> float(handler.update_cache_and_compute_loss(network, x, x, {"x": x}))  # an empty cache
    0.0
    >>> round(float(handler.update_cache_and_compute_loss(network, x, x, {"x": x})), 4)
    0.862
    """

    def __init__(
        self,
        cache_manager: CacheManager,
        cache_loss: Callable[..., CacheLossReturn],
        embedding_key: str,
        data_keys: Iterable[str],
        use_cross_replica: bool = False,
        *,
        new_items_filter: Callable[[NegativeCache, Mapping[str, Any]], Array] | None = None,
        group: Any = None,
    ) -> None:
        super().__init__(
            {SINGLE: cache_manager},
            cache_loss,
            embedding_key,
            data_keys,
            use_cross_replica,
            new_items_filter=new_items_filter,
            group=group,
        )
        self.cache_manager = cache_manager

    @property
    def cache(self) -> NegativeCache:
        """The cache as it is now."""
        return self._caches()[SINGLE]

    def update_cache_and_compute_loss(
        self,
        item_network: ItemNetwork,
        query_embeddings: Array,
        pos_item_embeddings: Array,
        features: Mapping[str, Array],
        **options: Any,
    ) -> Array:
        """Run one step: return the loss to differentiate and to log, and update the cache.

        item_network:        features by field, n rows each -> embeddings (n, D)
        query_embeddings:    (B, D)
        pos_item_embeddings: (B, D), the positives' embeddings by the same network
        features:            field -> (B, …), the positives' features, which enter the cache
        options:             positive_ids, hard_negative_embeddings, sample_weight, noise: see
                             CacheClassificationLoss
        """
        return self._step(
            item_network,
            query_embeddings,
            pos_item_embeddings,
            {SINGLE: pos_item_embeddings},
            {SINGLE: features},
            options,
        )

    def retrieve(
        self, query_embeddings: Array, features: Mapping[str, Array], **options: Any
    ) -> Retrieval:
        """Phase one: draw negatives. Embed the result's `.features`, perhaps with the positives.

        features: the positives', as in `update_cache_and_compute_loss`
        options:  positive_ids, noise: see the loss
        """
        return _two_phase(self.cache_loss).retrieve(
            query_embeddings,
            self._caches(),
            pos_features=self._stand_in({SINGLE: features}),
            **options,
        )

    def compute_loss(
        self,
        query_embeddings: Array,
        pos_item_embeddings: Array,
        neg_item_embeddings: Array,
        retrieval: Retrieval,
        **options: Any,
    ) -> CacheLossReturn:
        """Phase two: the loss from embeddings (B * S, D) of the retrieved features.

        options: hard_negative_embeddings, sample_weight: see the loss
        """
        result = _two_phase(self.cache_loss).loss_from_negatives(
            query_embeddings, pos_item_embeddings, neg_item_embeddings, retrieval, **options
        )
        return self._weighted(result, query_embeddings)

    def commit(
        self, result: CacheLossReturn, pos_item_embeddings: Array, features: Mapping[str, Array]
    ) -> None:
        """Phase three: write the fresh embeddings and the batch's own items into the cache."""
        self._check({SINGLE: pos_item_embeddings}, {SINGLE: features})
        self._commit(result, {SINGLE: pos_item_embeddings}, {SINGLE: features})


class MultiCacheLossHandler(Upkeep):
    """Several named caches that the loss treats as one, each fed by its own new items.

    cache_managers: name -> CacheManager; for the other arguments see CacheLossHandler
    """

    @property
    def cache(self) -> dict[str, NegativeCache]:
        """The caches as they are now, by name."""
        return dict(self._caches())

    def update_cache_and_compute_loss(
        self,
        item_network: ItemNetwork,
        query_embeddings: Array,
        pos_item_embeddings: Array,
        new_item_embeddings: Mapping[str, Array],
        new_item_features: Mapping[str, Mapping[str, Array]],
        **options: Any,
    ) -> Array:
        """Run one step, as CacheLossHandler does; what enters each cache is given by its name.

        new_item_embeddings: name -> (n, D); new_item_features: name -> field -> (n, …)
        """
        return self._step(
            item_network,
            query_embeddings,
            pos_item_embeddings,
            new_item_embeddings,
            new_item_features,
            options,
        )

    def retrieve(
        self,
        query_embeddings: Array,
        new_item_features: Mapping[str, Mapping[str, Array]],
        **options: Any,
    ) -> Retrieval:
        """Phase one: draw negatives from all caches together."""
        return _two_phase(self.cache_loss).retrieve(
            query_embeddings,
            self._caches(),
            pos_features=self._stand_in(new_item_features),
            **options,
        )

    compute_loss = CacheLossHandler.compute_loss

    def commit(
        self,
        result: CacheLossReturn,
        new_item_embeddings: Mapping[str, Array],
        new_item_features: Mapping[str, Mapping[str, Array]],
    ) -> None:
        """Phase three: write the fresh embeddings and the new items into the caches."""
        self._check(new_item_embeddings, new_item_features)
        self._commit(result, new_item_embeddings, new_item_features)

    def refresh(self, item_network: ItemNetwork, n: int, *, cache_name: str | None = None) -> Array:
        """Embed the n oldest written rows of one cache, or of each, anew; see CacheLossHandler.

        cache_name: the cache to refresh; None for all, n rows of each
        """
        names = list(self._managers) if cache_name is None else [cache_name]
        if not all(isinstance(name, str) for name in names):
            raise KindError(f"cache_name is {cache_name!r}: expected the name of a cache, or None.")
        check_keys(names, self._managers, "cache_name", exact=False)
        return self._refresh(names, item_network, n)

    def prefill(
        self,
        item_network: ItemNetwork,
        features: Mapping[str, Mapping[str, Any]],
        batch_size: int,
        *,
        progress: Progress | None = None,
    ) -> Array:
        """Fill the caches that are named in `features` from a corpus each; see CacheLossHandler.

        features: name -> field -> (N, …)
        """
        check_keys(check_mapping(features, "features"), self._managers, "features", exact=False)
        return self._prefill(features, item_network, batch_size, progress)


def _two_phase(cache_loss: Any) -> CacheClassificationLoss:
    if not isinstance(cache_loss, CacheClassificationLoss):
        raise KindError(
            f"cache_loss is a {type(cache_loss).__name__}, which has no phases: use "
            "update_cache_and_compute_loss, or a CacheClassificationLoss."
        )
    return cache_loss
