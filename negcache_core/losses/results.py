"""The interface of a cache loss, and what it returns."""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

from negcache_core.arrays._array import Array
from negcache_core.retrieval.result import Retrieval


class CacheLossReturn(NamedTuple):
    """What a cache loss returns. The first six fields are the published ones.

    training_loss:        the surrogate: its gradient counts, its value means nothing
    interpretable_loss:   the cross-entropy estimate from stale scores, in nats; never infinite.
                          NaN, without a gradient, where a query or its positive is not finite
    updated_item_data:    {embedding_key: (n, D)} fresh embeddings of the drawn rows, constants
    updated_item_indices: (n,) their slots
    updated_item_mask:    bool (n,); False: no row was drawn, or its embedding is not finite
    staleness:            |stale - fresh|^2 / |fresh|^2 of the drawn rows, reduced like the losses
    loss:                 value of interpretable_loss, gradient of training_loss: for training
    metrics:              scalars, see `negcache_core.losses.metrics.step_metrics`
    drift:                float32 (5,) with max_staleness: what a step tells the window of how fast
                          the item tower moves

    The three updated_item_* are dicts by cache name where the loss was given a dict of caches, and
    fit `CacheManager.update_cache` as they are.
    """

    training_loss: Any
    interpretable_loss: Any
    updated_item_data: Any
    updated_item_indices: Any
    updated_item_mask: Any
    staleness: Any
    loss: Any = None
    metrics: Any = None
    drift: Any = None


def refresh_of(retrieval: Retrieval, data: dict[str, Array], finite: Array) -> tuple[Any, Any, Any]:
    """Return the updated_item_* of drawn rows, by cache name where the caches were named.

    data: field -> (m, …) fresh; finite: bool (m,), which rows may be written
    """
    if not isinstance(retrieval.slots, dict):
        return data, retrieval.slots, retrieval.owned & finite
    masks = {name: mask & finite for name, mask in retrieval.owned.items()}
    return dict.fromkeys(retrieval.slots, data), retrieval.slots, masks


class CacheLoss(ABC):
    """A loss of queries, positives and a cache, as a handler calls it."""

    @abstractmethod
    def __call__(
        self, doc_network: Any, query_embeddings: Any, pos_doc_embeddings: Any, cache: Any
    ) -> CacheLossReturn:
        """Embed what the loss needs with `doc_network` and return a CacheLossReturn."""
