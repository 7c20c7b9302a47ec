"""The interface of a cache loss, and what it returns."""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

from negcache_core.arrays._array import Array
from negcache_core.retrieval.result import Retrieval


class CacheLossReturn(NamedTuple):
    """What a cache loss returns. The first six fields are those of the published code.

    training_loss:        the surrogate: its gradient counts, its value means nothing
    interpretable_loss:   the cross-entropy estimate from stale scores, in nats. It is never
                          infinite. It is NaN, without a gradient, where a query or its positive is
                          not finite.
    updated_item_data:    {embedding_key: (n, D)}, fresh embeddings of the drawn rows, constants
    updated_item_indices: (n,) integers, their slots
    updated_item_mask:    bool (n,), False where no row was drawn or its embedding is not finite
    staleness:            |stale - fresh|^2 / |fresh|^2 of the drawn rows, reduced like the losses
    loss:                 the value of interpretable_loss with the gradient of training_loss: use
                          this for training
    metrics:              scalars by name: see docs/metrics.md
    drift:                float32 (5,), with max_staleness what a step tells the window about how
                          fast the item tower moves

    The three updated_item_* are dicts by cache name if the loss was given a dict of caches. They
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
    """A loss of queries, positives and a cache. Subclass it for a loss of your own in a handler.

    Implement `__call__(doc_network, query_embeddings, pos_doc_embeddings, cache)`: embed what the
    loss needs with `doc_network`, and return a CacheLossReturn. Its `updated_item_*` may be None.
    """

    @abstractmethod
    def __call__(
        self, doc_network: Any, query_embeddings: Any, pos_doc_embeddings: Any, cache: Any
    ) -> CacheLossReturn:
        """Embed what the loss needs with `doc_network` and return a CacheLossReturn."""
