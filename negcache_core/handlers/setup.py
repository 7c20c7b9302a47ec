"""What a handler is made of, checked when it is made."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from negcache_core.arrays._array import Array, dtype_kind, dtype_name
from negcache_core.arrays.backend import Backend
from negcache_core.arrays.numerics import mean
from negcache_core.arrays.validation import check_mapping
from negcache_core.cache.manager import CacheManager
from negcache_core.cache.named import Caches, check_equal_fields
from negcache_core.cache.quantized import check_not_named, stores_embeddings
from negcache_core.cache.state import NegativeCache
from negcache_core.cache.window import new_window
from negcache_core.errors import DTypeError, KeysError, KindError, OptionError, ShapeError
from negcache_core.losses.classification import CacheClassificationLoss
from negcache_core.losses.results import CacheLossReturn
from negcache_core.retrieval.placement import HERE, Placement
from negcache_core.sharding.mirrored import Mirrored

NewItemsFilter = Callable[[NegativeCache, Mapping[str, Any]], Array]


class Setup(NamedTuple):
    """A handler without its state; see CacheLossHandler for the parts.

    managers: by sorted name
    mirrored: the replicas that write each other's rows; None for none
    report:   keeps a step's metrics for the user, before anything is written
    """

    managers: dict[str, CacheManager]
    loss: Callable[..., CacheLossReturn]
    embedding_key: str
    data_keys: tuple[str, ...]
    new_items_filter: NewItemsFilter | None
    mirrored: Mirrored | None
    report: Callable[[CacheLossReturn], None]
    backend: Backend

    @property
    def placement(self) -> Placement:
        """Where the cache is: as the loss says, or here if the loss does not say."""
        return getattr(self.loss, "placement", HERE)

    @property
    def windowed(self) -> bool:
        """Whether the caches have a window of ages; a user's own loss has none."""
        return getattr(self.loss, "max_staleness", None) is not None

    def init_caches(self, placement: Placement | None = None) -> Caches:
        """Return the part of each cache that is held here, or at another placement, empty."""
        caches = (placement or self.placement).init_caches(self.managers)
        if self.windowed:
            caches.window = new_window(self.backend.xp)
        return caches

    @property
    def item_keys(self) -> tuple[str, ...]:
        """The item fields that the loss reads besides data_keys; a user's own loss has none."""
        return tuple(getattr(self.loss, "item_keys", ()))

    def phased_loss(self) -> CacheClassificationLoss:
        """Return the loss; raise KindError if it has no phases."""
        if not isinstance(self.loss, CacheClassificationLoss):
            raise KindError(
                f"cache_loss is a {type(self.loss).__name__}, which has no phases: use "
                "update_cache_and_compute_loss, or a CacheClassificationLoss."
            )
        return self.loss

    def weighted(self, result: CacheLossReturn, queries: Array) -> CacheLossReturn:
        """Return a result whose mean over replicas equals the mean over the whole batch."""
        if self.mirrored is None or getattr(self.loss, "reducer", None) is not mean:
            return result
        return self.mirrored.weighted(result, queries)


def named_by_loss(given: Any, loss: Any, what: str) -> Any:
    """Return `given`, or if it is None the loss's own `what`; raise KeysError for neither."""
    named = getattr(loss, what, None) if given is None else given
    if named is None:
        raise KeysError(f"{what} is missing: the loss does not name it, so give it to the handler.")
    return named


def check_parts(
    managers: Any,
    loss: Any,
    embedding_key: str,
    data_keys: tuple[str, ...],
    new_items_filter: Any,
    backend: Backend,
) -> None:
    """Raise unless managers, loss and filter go together."""
    if not check_mapping(managers, "cache_managers"):
        raise KeysError("cache_managers is empty: expected at least one CacheManager.")
    for name, manager in managers.items():
        _check_manager(name, manager, embedding_key, data_keys, backend)
        _check_loss(loss, embedding_key, data_keys, manager, backend)
    if isinstance(loss, CacheClassificationLoss):  # a user's own may keep caches apart
        specs = {name: manager.specs for name, manager in managers.items()}
        check_equal_fields(specs, (embedding_key, *data_keys, *loss.item_keys))
    if new_items_filter is not None and not callable(new_items_filter):
        raise KindError(
            f"new_items_filter is {new_items_filter!r}: expected a function (cache, new_items) "
            "-> bool mask such as IsInCacheFilterFn(keys), or None."
        )


def check_sharing(
    managers: Mapping[str, CacheManager],
    loss: Any,
    group: Any,
    *,
    use_cross_replica: bool,
    filters: bool,
) -> None:
    """Refuse options that do not fit where the cache is; note what replicas must share."""
    placement: Any = getattr(loss, "placement", HERE)
    if not placement.sharded:
        if group is not None and not use_cross_replica:
            raise OptionError(
                "a group was given to a handler that shares nothing: use a "
                "DistributedCacheClassificationLoss, or use_cross_replica=True."
            )
        return
    if use_cross_replica:
        raise OptionError(
            "use_cross_replica=True keeps a whole cache on every replica, but a "
            "DistributedCacheClassificationLoss splits it into shards: choose one of the two."
        )
    if group is not None and group != getattr(loss, "group", None):
        raise OptionError("the handler and its loss have different groups: give both the same.")
    for name, manager in managers.items():
        for option in ("cache_size", "use_lru", "unique_key"):
            placement.facts[f"{name}.{option}"] = getattr(manager, option)
    placement.facts["new_items_filter"] = filters


def _check_manager(
    name: Any,
    manager: CacheManager,
    embedding_key: str,
    data_keys: tuple[str, ...],
    backend: Backend,
) -> None:
    if not isinstance(name, str):
        raise KeysError(f"cache_managers has key {name!r}: the names of caches are strings.")
    if not isinstance(manager, CacheManager):
        raise KindError(
            f"cache_manager {name!r} is a {type(manager).__name__}: expected CacheManager."
        )
    _check_backend(manager, f"cache_manager {name!r}", backend)
    missing = [key for key in (embedding_key, *data_keys) if key not in manager.specs]
    if missing:
        raise KeysError(
            f"the specs of cache {name!r} lack {missing}: expected embedding_key {embedding_key!r} "
            f"and data_keys {list(data_keys)} among {sorted(manager.specs)}."
        )
    spec = manager.specs[embedding_key]
    if len(spec.shape) != 1 or not stores_embeddings(spec.dtype):
        raise DTypeError(
            f"embedding field {embedding_key!r} of cache {name!r} is {spec}: expected one vector "
            "for each row, of a floating dtype or int8, such as FieldSpec((128,), 'float32')."
        )
    if spec.shape == (0,):
        raise ShapeError(
            f"embedding field {embedding_key!r} of cache {name!r} is {spec}: expected a width D of "
            "at least 1."
        )


def _check_loss(
    cache_loss: Any,
    embedding_key: str,
    data_keys: tuple[str, ...],
    manager: CacheManager,
    backend: Backend,
) -> None:
    if not callable(cache_loss):
        raise KindError(
            f"cache_loss is a {type(cache_loss).__name__}: expected a CacheClassificationLoss."
        )
    if isinstance(cache_loss, CacheClassificationLoss):
        _check_backend(cache_loss, "cache_loss", backend)
    for what, own in (("embedding_key", embedding_key), ("data_keys", data_keys)):
        other = getattr(cache_loss, what, own)
        if other != own:
            raise OptionError(
                f"the handler has {what}={own!r}, but its loss has {other!r}: give both the same."
            )
    item_keys = getattr(cache_loss, "item_keys", ())
    missing = [key for key in item_keys if key not in manager.specs]
    if missing:
        raise KeysError(
            f"the loss reads {missing} (id_keys, group_key, log_frequency_key), which the cache "
            f"lacks: add the field to its specs, {sorted(manager.specs)}."
        )
    check_not_named((*data_keys, *item_keys), manager.specs, embedding_key)
    if isinstance(cache_loss, CacheClassificationLoss):
        _check_item_fields(cache_loss, manager)
        if cache_loss.prefixes is not None:
            cache_loss.prefixes.check(manager.specs[embedding_key].shape[0])


def _check_item_fields(loss: CacheClassificationLoss, manager: CacheManager) -> None:
    """Raise unless each field that identifies rows is one number of the right kind."""
    for what, keys, kind in (
        ("id_keys", loss.id_keys, "integer"),
        ("group_key", (loss.group_key,), "integer"),
        ("log_frequency_key", (loss.log_frequency_key,), "floating"),
    ):
        for key in keys:
            spec = None if key is None else manager.specs[key]
            if spec is not None and (spec.shape != () or dtype_kind(spec.dtype) != kind):
                raise DTypeError(
                    f"{what} names field {key!r} of row shape {spec.shape} and dtype "
                    f"{dtype_name(spec.dtype)}: expected one {kind} number for each row, shape ()."
                )


def _check_backend(part: Any, what: str, backend: Backend) -> None:
    if type(part.backend) is not type(backend):
        raise KindError(
            f"{what} is made for {part.backend.name} but the handler for {backend.name}: take "
            "both from the same package."
        )
