"""The handler of several named caches, which the loss treats as one."""

from collections.abc import Mapping
from typing import Any

from negcache_core.arrays._array import Array
from negcache_core.arrays.validation import check_keys, check_mapping
from negcache_core.cache.state import NegativeCache
from negcache_core.errors import KindError
from negcache_core.handlers import upkeep
from negcache_core.handlers.base import BaseHandler
from negcache_core.handlers.step import ItemNetwork
from negcache_core.handlers.upkeep import Progress
from negcache_core.losses.results import CacheLossReturn
from negcache_core.retrieval.result import Retrieval


class MultiCacheLossHandler(BaseHandler):
    """Several named caches that the loss treats as one. Each is fed by its own new items.

    cache_managers: name -> CacheManager

    The other arguments are those of CacheLossHandler. So are the methods that are not described
    here, such as `save` and `load`.
    """

    @property
    def cache(self) -> dict[str, NegativeCache]:
        """The caches as they are now, by name."""
        return dict(self._store.read())

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
    ) -> Array:
        """Run one training step: return the loss, and update the caches.

        new_item_embeddings: name -> (n, D), the embeddings of what enters each cache
        new_item_features:   name -> field -> (n, …), the features and labels of what enters each
                             cache

        Every cache is named. The other arguments are those of CacheLossHandler.
        """
        return self._step(
            item_network,
            query_embeddings,
            pos_item_embeddings,
            new_item_embeddings,
            new_item_features,
            training,
            options,
        )

    def evaluate(
        self,
        item_network: ItemNetwork | None,
        query_embeddings: Array,
        pos_item_embeddings: Array,
        new_item_features: Mapping[str, Mapping[str, Array]],
        **options: Any,
    ) -> CacheLossReturn:
        """Return the loss against the caches as they are: nothing is drawn, written or aged.

        The arguments are those of CacheLossHandler, with the features by name of the cache.
        """
        return self._evaluate(
            item_network, query_embeddings, pos_item_embeddings, new_item_features, options
        )

    def retrieve(
        self,
        query_embeddings: Array,
        new_item_features: Mapping[str, Mapping[str, Array]],
        *,
        pos_item_embeddings: Array | None = None,
        **options: Any,
    ) -> Retrieval:
        """Draw negatives from all caches together: the first of the three phases of a step.

        The arguments are those of CacheLossHandler, with the features by name of the cache.
        """
        return self._retrieve(query_embeddings, new_item_features, pos_item_embeddings, options)

    def commit(
        self,
        result: CacheLossReturn,
        new_item_embeddings: Mapping[str, Array],
        new_item_features: Mapping[str, Mapping[str, Array]],
    ) -> None:
        """Write fresh embeddings and new items to the caches: the last of the three phases."""
        self._commit(result, new_item_embeddings, new_item_features)

    def refresh(self, item_network: ItemNetwork, n: int, *, cache_name: str | None = None) -> Array:
        """Embed the n oldest rows of one cache again, or of each; return how many were not finite.

        cache_name: the cache to refresh; None: all of them, n rows of each

        More about it: CacheLossHandler.
        """
        names = list(self._managers) if cache_name is None else [cache_name]
        if not all(isinstance(name, str) for name in names):
            raise KindError(f"cache_name is {cache_name!r}: expected the name of a cache, or None.")
        check_keys(names, self._managers, "cache_name", exact=False)
        return upkeep.refresh(self._setup, self._store, names, item_network, n)

    def prefill(
        self,
        item_network: ItemNetwork,
        features: Mapping[str, Mapping[str, Any]],
        batch_size: int,
        *,
        progress: Progress | None = None,
    ) -> Array:
        """Fill the caches that `features` names; return how many rows were left out.

        features: name -> field -> (N, …), a corpus for each cache that is named

        Rows whose embedding is not finite are left out. More about it: CacheLossHandler.
        """
        check_keys(check_mapping(features, "features"), self._managers, "features", exact=False)
        return upkeep.prefill(
            self._setup, self._store, features, item_network, batch_size, progress
        )
