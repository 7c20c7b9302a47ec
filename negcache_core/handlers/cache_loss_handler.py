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
    """A cache, its loss, and the training step that uses and updates both.

    cache_manager:     a CacheManager. Its specs are embedding_key, data_keys, and any fields that
                       the loss or the filter needs.
    cache_loss:        a CacheClassificationLoss, or any function (doc_network, query_embeddings,
                       pos_doc_embeddings, cache) -> CacheLossReturn
    embedding_key:     the field of item embeddings; by default that of the loss
    data_keys:         the fields that the item network takes; by default those of the loss
    use_cross_replica: every replica writes the rows of all replicas, so that their caches stay
                       equal
    new_items_filter:  chooses which items enter, such as IsInCacheFilterFn(keys); by default all do
    group:             the replicas that share the cache; None: all

    `cache` is the live state, and `metrics` holds the last step's scalars. `prefill` and `refresh`
    maintain the cache between steps.

    Source: the paper, algorithm 2, and the published `handlers.CacheLossHandler`, which has no
    filter and returns another loss.

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
        """The manager of the cache, with its current size."""
        return self._managers[SINGLE]

    @property
    def cache(self) -> NegativeCache:
        """The cache as it is now: live arrays, not copies."""
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
        """Run one training step: return the loss, and update the cache.

        item_network:        a function of features by field, n rows each, that returns embeddings
                             (n, D)
        query_embeddings:    (B, D), one row per query
        pos_item_embeddings: (B, D), embeddings of the positives by the same network
        features:            field -> (B, …), the features of the positives, which enter the cache
        labels:              fields that the network does not take, such as ids; `features` may hold
                             them as well
        training:            False: return the loss against the cache as it is; nothing is drawn
                             from a generator, written, or aged. None: True, but in PyTorch not for
                             a handler in `.eval()` mode or without gradients
        options:             positive_ids, hard_negative_embeddings, hard_negative_features,
                             competing_scores, sample_weight, noise, constant: see
                             CacheClassificationLoss

        Differentiate what it returns, and log it. Calling the handler does the same.

        Raises KeysError, ShapeError, DTypeError, KindError or OptionError for arguments that do not
        fit, and for a wrong output of the network. Any exception leaves the cache as it was.
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
        """Return the loss against the cache as it is: nothing is drawn, written or aged.

        item_network: a function that embeds a few rows, for the metrics of staleness; None: these
                      metrics are those of a fresh cache
        options:      positive_ids, hard_negative_embeddings, hard_negative_features,
                      competing_scores, sample_weight: see CacheClassificationLoss

        The value does not depend on random draws.
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
        """Draw negatives: the first of the three phases of a step.

        features:            field -> (B, …), the features of the positives
        pos_item_embeddings: (B, D), needed only for a loss with a `margin`
        options:             positive_ids, noise: see CacheClassificationLoss

        Embed the `.features` of the result, together with the positives if you like, and give the
        embeddings to `compute_loss`.
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
        """Write to the cache: the last of the three phases of a step.

        result: what `compute_loss` returned

        The fresh embeddings of the drawn rows and the batch's own items are written. In evaluation
        mode nothing is.
        """
        given = {SINGLE: with_labels(features, labels)}
        self._commit(result, {SINGLE: pos_item_embeddings}, given)

    def refresh(self, item_network: ItemNetwork, n: int) -> Array:
        """Embed the n oldest rows again; return how many were left out as not finite.

        item_network: a function of features by field, rows of the cache, that returns embeddings
                      (n, D)
        n:            how many rows to embed, 0 <= n <= C; of equal ages the lowest slots

        The age of these rows becomes 0, whatever `use_lru` is: the next call takes other rows, and
        these leave the cache later. No other row ages, as this is not a step. With a cache that
        holds the whole corpus and a refresh every step, this is the paper's algorithm for a cache
        that is not streaming (section 3.2).

        A row whose new embedding is not finite keeps the old one and its age, so it is the first to
        be refreshed or overwritten next time. If fewer than n rows are written, the oldest one
        stands in for the rest. An empty cache stays as it is; in a traced function, which cannot
        see that it is empty, the network gets rows of zeros and its output is dropped. With
        `use_cross_replica`, every replica writes the first replica's embeddings. Cost: the network
        on n rows, and one pass over the ages.

        JAX: `state = handler.refresh(state, item_network, n)`, with no count.

        Raises CapacityError if n > C, KindError or OptionError if n is not a whole number of at
        least 0, and ShapeError or DTypeError for a wrong output. Any exception leaves the cache as
        it was.
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

        item_network: a function of features by field, n <= batch_size rows each, that returns
                      embeddings (n, D)
        features:     field -> (N, …), every field of the cache but the embedding, N <= C
        batch_size:   how many rows to embed at a time; the last batch may be smaller
        labels:       fields that the network does not take; `features` may hold them as well
        progress:     a function that wraps the list of batches, such as tqdm.tqdm; None: no
                      progress bar

        Rows enter as new items do: only if `new_items_filter` lets them; into their own slot if the
        manager has a `unique_key`; else into empty slots first, then over the oldest. All of them
        then have age 0, and the other rows keep theirs. If the network raises, the batches before
        are in the cache. It is a Python loop and runs eagerly. With `use_cross_replica`, give every
        replica the same features; the first replica's embeddings count.

        JAX: `state = handler.prefill(state, item_network, features, batch_size)`, with no count.

        Raises CapacityError if N > C, KindError or OptionError for a wrong batch_size or progress,
        and KeysError, ShapeError or DTypeError for wrong features, before the network runs.
        """
        given = {SINGLE: with_labels(features, labels)}
        return upkeep.prefill(self._setup, self._store, given, item_network, batch_size, progress)
