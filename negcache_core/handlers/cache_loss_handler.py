"""The handler of one cache."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from negcache_core.arrays._array import Array
from negcache_core.cache.manager import CacheManager
from negcache_core.cache.named import SINGLE
from negcache_core.cache.state import NegativeCache
from negcache_core.handlers import upkeep
from negcache_core.handlers.base import BaseHandler
from negcache_core.handlers.new_items import with_labels
from negcache_core.handlers.setup import NewItemsFilter
from negcache_core.handlers.step import ItemNetwork
from negcache_core.handlers.upkeep import Progress
from negcache_core.losses.results import CacheLossReturn
from negcache_core.retrieval.result import Retrieval


class CacheLossHandler(BaseHandler):
    """One cache, its loss, and the step that uses and updates them.

    cache_manager:     a CacheManager; its specs are embedding_key, data_keys, and any more fields
                       that the filter needs
    cache_loss:        a CacheClassificationLoss, or any function (doc_network, query_embeddings,
                       pos_doc_embeddings, cache) -> CacheLossReturn
    embedding_key:     the field of item embeddings; by default that of the loss
    data_keys:         the fields that the item network takes; by default those of the loss
    use_cross_replica: every replica writes the rows of all, so that their caches stay equal
    new_items_filter:  which items may enter, such as IsInCacheFilterFn(keys); all by default
    group:             the replicas that share the cache; None for all

    `cache` is the live state, `metrics` the last step's scalars; `prefill` and `refresh` keep the
    cache up between steps. Source: the paper, algorithm 2, and the published
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
        embedding_key: str | None = None,
        data_keys: Iterable[str] | None = None,
        use_cross_replica: bool = False,
        *,
        new_items_filter: NewItemsFilter | None = None,
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

    @property
    def cache_manager(self) -> CacheManager:
        """The manager of the cache, of the size that it has now."""
        return self._managers[SINGLE]

    @property
    def cache(self) -> NegativeCache:
        """The cache as it is now."""
        return self._store.read()[SINGLE]

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
    ) -> Array:
        """Run one step: return the loss to differentiate and to log, and update the cache.

        item_network:        features by field, n rows each -> embeddings (n, D)
        query_embeddings:    (B, D)
        pos_item_embeddings: (B, D), the positives' embeddings by the same network
        features:            field -> (B, …), the positives' features, which enter the cache
        labels:              fields that the network does not take, such as ids; they may as well be
                             among the features
        training:            False: the loss against the cache as it is; nothing is drawn from a
                             generator, written, or grows older. None: PyTorch's module is asked
                             (`.train()`, `.eval()`), and without gradients it does not learn;
                             elsewhere it does.
        options:             positive_ids, hard_negative_embeddings, hard_negative_features,
                             competing_scores, sample_weight, noise, constant: see
                             CacheClassificationLoss

        Calling the handler does the same.
        """
        return self._step(
            item_network,
            query_embeddings,
            pos_item_embeddings,
            {SINGLE: pos_item_embeddings},
            {SINGLE: with_labels(features, labels)},
            training,
            options,
        )

    def evaluate(
        self,
        item_network: ItemNetwork | None,
        query_embeddings: Array,
        pos_item_embeddings: Array,
        features: Mapping[str, Array],
        *,
        labels: Mapping[str, Array] | None = None,
        **options: Any,
    ) -> CacheLossReturn:
        """Return the loss against the cache as it is: nothing is drawn, written, or grows older.

        item_network: None, or a network to embed a few rows with, for the metrics that tell how
                      stale the cache is; without it they are those of a fresh cache
        options:      positive_ids, hard_negative_embeddings, hard_negative_features,
                      competing_scores, sample_weight: see the loss

        The value does not depend on draws: no generator is asked, rows are chosen without one.
        """
        given = {SINGLE: with_labels(features, labels)}
        return self._evaluate(item_network, query_embeddings, pos_item_embeddings, given, options)

    def retrieve(
        self,
        query_embeddings: Array,
        features: Mapping[str, Array],
        *,
        labels: Mapping[str, Array] | None = None,
        pos_item_embeddings: Array | None = None,
        **options: Any,
    ) -> Retrieval:
        """Phase one: draw negatives. Embed the result's `.features`, perhaps with the positives.

        features:            the positives', as in `update_cache_and_compute_loss`
        pos_item_embeddings: (B, D), needed for a loss with a `margin` alone
        options:             positive_ids, noise: see the loss
        """
        given = {SINGLE: with_labels(features, labels)}
        return self._retrieve(query_embeddings, given, pos_item_embeddings, options)

    def commit(
        self,
        result: CacheLossReturn,
        pos_item_embeddings: Array,
        features: Mapping[str, Array],
        *,
        labels: Mapping[str, Array] | None = None,
    ) -> None:
        """Phase three: write the fresh embeddings and the batch's own items into the cache.

        In evaluation nothing is written.
        """
        given = {SINGLE: with_labels(features, labels)}
        self._commit(result, {SINGLE: pos_item_embeddings}, given)

    def refresh(self, item_network: ItemNetwork, n: int) -> Array:
        """Embed the n oldest written rows anew; return how many were left out as not finite.

        item_network: data_keys -> (n, …), rows of the cache -> embeddings (n, D)
        n:            rows to embed, 0 <= n <= C; of equal ages the lowest slots

        Their age becomes 0, that of a new row, whatever `use_lru` is: so the next call goes on
        with other rows, and they leave the cache later. No other row grows older: this is no step.
        With a capacity of the whole corpus and a refresh every step this is the paper's algorithm
        for a cache that is not streaming (section 3.2).

        A row whose fresh embedding is not finite keeps the old one and its age: it is first in
        line again, to be embedded and to be overwritten by a new item. Where fewer than n rows are
        written, the oldest stands in for the rest. An empty cache is left alone; in a traced
        function, which cannot see that it is empty, the network gets rows of zeros and its
        output is dropped. With `use_cross_replica`, every replica writes the embeddings of the
        first. Cost: the network on n rows, and one pass over the ages.

        JAX: `state = handler.refresh(state, item_network, n)`, with no count.

        Raises CapacityError if n > C, KindError or OptionError if n is no such number, and
        ShapeError or DTypeError for a wrong output. Any exception leaves the cache as it was.
        """
        return upkeep.refresh(self._setup, self._store, (SINGLE,), item_network, n)

    def prefill(
        self,
        item_network: ItemNetwork,
        features: Mapping[str, Any],
        batch_size: int,
        *,
        labels: Mapping[str, Any] | None = None,
        progress: Progress | None = None,
    ) -> Array:
        """Fill the cache from a corpus; return how many rows were left out as not finite.

        item_network: data_keys -> (n, …) -> embeddings (n, D), for n <= batch_size
        features:     field -> (N, …), every field of the cache but the embedding, N <= C; labels
                      may as well be apart
        batch_size:   rows to embed at a time; the last batch may be smaller
        progress:     None, or a function that wraps the list of batches, such as tqdm.tqdm

        Rows enter as new items do: past `new_items_filter`, to their own slot if the manager has a
        `unique_key`, else into empty slots and then over the oldest. Afterwards they are equally
        young, all of age 0, and all other rows are as old as they were. If the network raises, the
        batches before it are in the cache. Runs eagerly: it is a Python loop. With
        `use_cross_replica`, give every replica the same features; the first's embeddings count.

        JAX: `state = handler.prefill(state, item_network, features, batch_size)`, with no count.

        Raises CapacityError if N > C, KindError or OptionError for a wrong batch_size or progress,
        and KeysError, ShapeError or DTypeError for wrong features, before the network runs.
        """
        given = {SINGLE: with_labels(features, labels)}
        return upkeep.prefill(self._setup, self._store, given, item_network, batch_size, progress)
