"""The front door: a cache, its loss and its handler in one line."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, NamedTuple

from negcache_core.arrays._array import Array
from negcache_core.arrays.numerics import mean
from negcache_core.cache.manager import CacheManager
from negcache_core.errors import KeysError
from negcache_core.handlers.cache_loss_handler import CacheLossHandler
from negcache_core.handlers.fields import Fields, fields_of
from negcache_core.handlers.setup import NewItemsFilter
from negcache_core.losses.classification import CacheClassificationLoss
from negcache_core.sharding.classification import DistributedCacheClassificationLoss


class Parts(NamedTuple):
    """The classes of one array library that a NegativeCacheLoss is made of."""

    manager: type[CacheManager]
    loss: type[CacheClassificationLoss]
    sharded_loss: type[DistributedCacheClassificationLoss]


class NegativeCacheLoss(CacheLossHandler):
    """Softmax cross-entropy of each query's item against all items in a cache.

    cache_size: C, the number of items that the cache holds
    features:   what the item network takes: an example batch, field -> (B, …), or field ->
                FieldSpec of one row
    embedding:  an example batch of item embeddings (B, D), whose dtype the cache stores; or the
                width D, stored as float32; or FieldSpec((D,), dtype), where int8 stores each row
                as codes and a scale
    scale:      factor on the dot products, the inverse of the temperature: a number, a trained
                parameter, or a function of no arguments that returns one. 20 suits embeddings of
                length 1.
    labels:     fields that the cache keeps but the item network does not take, such as an item's
                id; given like `features`. A step finds them in its `labels` or in its `features`.
    id_keys:    integer fields that identify an item. A row that has the same value as the query's
                item in any of them is not a negative of that query: it is neither drawn nor
                counted.
    group_key:  an integer field; only rows with the query's own value are its negatives
    margin:     leave out rows whose score beats the positive's by more than this
    estimator:  "exact_query", "shared" or "paper"; "auto" is "exact_query" where the other options
                allow it, else "shared"
    in_batch_negatives: also compete against the batch's other positives, exactly and with gradients
    max_staleness: let rows compete up to the age at which they are expected to be this much staler
                than a row just embedded; None: at every age
    matryoshka_dims: widths, which need not include D. The loss is then the sum of the losses at
                these widths, of embeddings cut to their first coordinates and divided by their
                length.
    matryoshka_weights: factors on these losses; 1 each by default
    use_lru, unique_key: see CacheManager
    use_cross_replica, new_items_filter: see CacheLossHandler
    group:      the replicas that share one cache, in shards; None: no sharing

    The other options are those of CacheClassificationLoss. A NegativeCacheLoss is a
    CacheLossHandler, so it has `prefill`, `refresh`, `save`, `load`, `metrics` and the three
    phases.

    Raises KeysError, KindError, ShapeError, DTypeError, CapacityError or OptionError for an
    argument that cannot work.

    >>> import numpy as np
    >>> tokens = np.asarray([[1, 2], [3, 0], [2, 2]])  # your data: three items
    >>> vectors = np.eye(4, dtype=np.float32)
    >>> item_network = lambda features: vectors[features["tokens"]].mean(axis=1)
    >>> items = item_network({"tokens": tokens})
    >>> loss_fn = NegativeCacheLoss(8, {"tokens": tokens}, items, scale=20.0, generator=0)
    >>> round(float(loss_fn(item_network, items, items, {"tokens": tokens})), 3)
    0.231
    >>> print(loss_fn)
    NegativeCacheLoss(8 slots, 3 written, 256 bytes: tokens int64 (2,), embedding float32 (4,);
      estimator exact_query with in-batch negatives, scale 20, max_staleness 0.2;
      staleness 0.000, window 4 steps)
    """

    parts: ClassVar[Parts] = Parts(
        CacheManager, CacheClassificationLoss, DistributedCacheClassificationLoss
    )

    def __init__(
        self,
        cache_size: int,
        features: Mapping[str, Any],
        embedding: Any,
        scale: Any = 20.0,
        *,
        labels: Mapping[str, Any] | None = None,
        id_keys: Iterable[str] = (),
        group_key: str | None = None,
        margin: float | None = None,
        estimator: str = "auto",
        in_batch_negatives: bool = True,
        num_samples: int = 1,
        top_k: int | None = None,
        log_frequency_key: str | None = None,
        max_staleness: float | None = 0.2,
        staleness_correction: bool = False,
        matryoshka_dims: Iterable[int] | None = None,
        matryoshka_weights: Iterable[float] | None = None,
        score_transform: Callable[[Any], Array] | None = None,
        retrieval_fn: Callable[[Any], Array] | None = None,
        reducer: Callable[[Any], Array] | None = mean,
        generator: Any = None,
        tile_bytes: int | None = None,
        fused: bool = False,
        use_lru: bool = True,
        unique_key: str | None = None,
        use_cross_replica: bool = False,
        new_items_filter: NewItemsFilter | None = None,
        group: Any = None,
    ) -> None:
        fields = fields_of(features, embedding, labels, self.backend)
        sharded = group is not None and not use_cross_replica
        loss = (self.parts.sharded_loss if sharded else self.parts.loss)(
            fields.embedding_key,
            fields.data_keys,
            score_transform,
            top_k,
            reducer,
            retrieval_fn=retrieval_fn,
            scale=scale,
            estimator=estimator,
            num_samples=num_samples,
            in_batch_negatives=in_batch_negatives,
            id_keys=id_keys,
            group_key=group_key,
            margin=margin,
            log_frequency_key=log_frequency_key,
            max_staleness=max_staleness,
            staleness_correction=staleness_correction,
            matryoshka_dims=matryoshka_dims,
            matryoshka_weights=matryoshka_weights,
            generator=generator,
            tile_bytes=tile_bytes,
            fused=fused,
            **({"group": group} if sharded else {}),
        )
        _check_named(loss.item_keys, unique_key, fields)
        super().__init__(
            self.parts.manager(fields.specs, cache_size, use_lru, unique_key=unique_key),
            loss,
            fields.embedding_key,
            fields.data_keys,
            use_cross_replica,
            new_items_filter=new_items_filter,
            group=None if sharded else group,
        )


def _check_named(item_keys: tuple[str, ...], unique_key: Any, fields: Fields) -> None:
    """Raise KeysError unless every field that an option names exists."""
    named = [*item_keys, *([unique_key] if isinstance(unique_key, str) else [])]
    missing = [key for key in named if key not in fields.specs]
    if missing:
        known = [key for key in fields.specs if key != fields.embedding_key]
        raise KeysError(
            f"id_keys, group_key, log_frequency_key or unique_key names {missing}, but features "
            f"and labels have {known}: add the field to labels, labels={{{missing[0]!r}: …}}."
        )
