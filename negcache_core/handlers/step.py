"""A step: retrieve, embed, loss, commit; what the handlers of one cache and of several share.

An adapter supplies where the state lives (`_hold`, `_caches`) and what is done with a step's
report; the order of things stands here once. The cache is written last, after everything that can
fail, so an exception anywhere leaves it as it was.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

from negcache_core.arrays._array import Array, cast, dtype_kind, length
from negcache_core.arrays.backend import NUMPY, Backend
from negcache_core.arrays.numerics import finite_rows, mean
from negcache_core.arrays.validation import (
    as_array,
    check_field_names,
    check_flag,
    check_function,
    check_keys,
    check_mapping,
    in_order,
)
from negcache_core.cache.manager import CacheManager, UpdatePlan
from negcache_core.cache.row_checks import check_mask, check_rows
from negcache_core.cache.state import NegativeCache
from negcache_core.errors import DTypeError, KeysError, KindError, OptionError
from negcache_core.losses.classification import CacheClassificationLoss
from negcache_core.losses.results import CacheLossReturn
from negcache_core.sharding.placement import ShardedLoss, check_sharded, init_shards


class BaseHandler:
    """Holds caches and a loss, and runs steps; see CacheLossHandler for the arguments."""

    backend: ClassVar[Backend] = NUMPY

    def __init__(
        self,
        cache_managers: Mapping[str, CacheManager],
        cache_loss: Callable[..., CacheLossReturn],
        embedding_key: str,
        data_keys: Iterable[str],
        use_cross_replica: bool = False,
        *,
        new_items_filter: Callable[[NegativeCache, Mapping[str, Any]], Array] | None = None,
        group: Any = None,
    ) -> None:
        super().__init__()
        embedding_key, keys = check_field_names(embedding_key, data_keys)
        if not check_mapping(cache_managers, "cache_managers"):
            raise KeysError("cache_managers is empty: expected at least one CacheManager.")
        for name, manager in cache_managers.items():
            _check_manager(name, manager, embedding_key, keys, self.backend)
            _check_loss(cache_loss, embedding_key, keys, manager, self.backend)
        if new_items_filter is not None and not callable(new_items_filter):
            raise KindError(
                f"new_items_filter is {new_items_filter!r}: expected a function (cache, new_items) "
                "-> bool mask such as IsInCacheFilterFn(keys), or None."
            )
        self.embedding_key, self.data_keys = embedding_key, keys
        self.cache_loss = cache_loss
        self.use_cross_replica = check_flag(use_cross_replica, "use_cross_replica")
        self.new_items_filter = new_items_filter
        self.group = group
        self._managers = dict(cache_managers)
        if isinstance(cache_loss, ShardedLoss):
            check_sharded(cache_loss, self)
        elif group is not None and not self.use_cross_replica:
            raise OptionError(
                "a group was given to a handler that shares nothing: use a "
                "DistributedCacheClassificationLoss, or use_cross_replica=True."
            )
        self._hold()
        self.metrics: dict[str, Any] = {}

    def _init_caches(self) -> dict[str, NegativeCache]:
        if isinstance(self.cache_loss, ShardedLoss):
            return init_shards(self._managers, self.cache_loss.replicas)
        return {name: manager.init_cache() for name, manager in self._managers.items()}

    def _hold(self) -> None:
        """Make the initial state and take charge of it."""
        self._tables = self._init_caches()

    def _keep(self, caches: dict[str, NegativeCache]) -> None:
        """Take charge of the state after a step; tables written in place need nothing."""
        del caches  # not an empty body, of which TensorFlow's AutoGraph would warn

    def _caches(self) -> dict[str, NegativeCache]:
        """Return the state as it is now, by cache name; writes to its arrays change it."""
        return self._tables

    def _report(self, result: CacheLossReturn) -> None:
        """Keep a step's metrics for the user to read."""
        self.metrics = {
            key: self.backend.stop_gradient(as_array(value, f"metrics[{key!r}]", self.backend))
            for key, value in _mapping_or_none(result.metrics, "metrics").items()
        }

    def _step(
        self,
        item_network: Any,
        query_embeddings: Array,
        pos_item_embeddings: Array,
        embeddings: Mapping[str, Array],
        features: Mapping[str, Mapping[str, Array]],
        options: Mapping[str, Any],
    ) -> Array:
        """Run one whole step; `embeddings` and `features` are the new rows by cache name.

        options: further arguments of the loss
        """
        arguments = {
            "doc_network": item_network,
            "query_embeddings": query_embeddings,
            "pos_doc_embeddings": pos_item_embeddings,
            "cache": self._caches(),
            **options,
        }
        if isinstance(self.cache_loss, CacheClassificationLoss):  # another may take no network
            check_function(item_network, "item_network", "a function of features")
        self._check(embeddings, features)
        if not isinstance(self.cache_loss, CacheClassificationLoss):
            result = self._weighted(self.cache_loss(**arguments), query_embeddings)
            self._commit(result, embeddings, features)
        else:
            arguments["pos_features"] = self._stand_in(features)
            with self.cache_loss.undone_on_error():
                result = self._weighted(self.cache_loss(**arguments), query_embeddings)
                self._commit(result, embeddings, features)
        return result.training_loss if result.loss is None else result.loss

    def _stand_in(self, features: Mapping[str, Mapping[str, Array]]) -> dict[str, Array] | None:
        """Return what the loss needs of the new rows: the first cache's, or the first that has any.

        They stand in for queries without a usable slot.
        """
        rows, keys = None, (*self.data_keys, *_item_keys(self.cache_loss))
        check_keys(check_mapping(features, "features"), self._managers, "features", exact=False)
        for name in sorted(features):
            missing = [key for key in keys if key not in check_mapping(features[name], "features")]
            if missing:
                raise KeysError(
                    f"features lack {missing}: the loss needs {list(keys)} of each positive, and "
                    f"features have {in_order(features[name])}."
                )
            given = {key: features[name][key] for key in keys}
            rows, count = check_rows(given, self._caches()[name], "features", self.backend)
            if not isinstance(count, int) or count:
                return rows
        return rows

    def _check(
        self, embeddings: Mapping[str, Array], features: Mapping[str, Mapping[str, Array]]
    ) -> None:
        """Refuse a bad batch by its keys, shapes and dtypes, before any network runs."""
        caches = self._caches()
        for what, given in (("new_item_embeddings", embeddings), ("new_item_features", features)):
            check_keys(check_mapping(given, what), caches, what, exact=True)
        for name in caches:
            self._new_items(name, embeddings[name], features[name])

    def _plan(
        self,
        name: str,
        result: CacheLossReturn,
        embeddings: Array,
        features: Mapping[str, Array],
    ) -> UpdatePlan:
        """Plan the update of one cache; nothing is written."""
        cache = self._caches()[name]
        new_items = self._new_items(name, embeddings, features)
        mask, key = self._new_items_mask(cache, new_items), self._managers[name].unique_key
        if key is not None and isinstance(self.cache_loss, ShardedLoss):
            new_items, mask = self.cache_loss.bring_home(cache, key, new_items, mask)
        update = {
            "new_items": new_items,
            "new_items_mask": mask,
            **_refresh_of(result, name),
        }
        if self.use_cross_replica:
            update = {key: self._all_gather(value) for key, value in update.items()}
        return self._managers[name].plan_update(cache, **update)

    def _weighted(self, result: CacheLossReturn, queries: Array) -> CacheLossReturn:
        """Weigh a replica's mean by its share of all queries.

        So the mean over replicas, which data-parallel training takes of gradients, is that of the
        whole batch, whatever its parts are.
        """
        if not self.use_cross_replica or getattr(self.cache_loss, "reducer", None) is not mean:
            return result
        xp = self.backend.xp
        ones = xp.zeros_like(result.training_loss)[None] + 1.0
        own = cast(length(queries, xp) * ones, ones.dtype, xp)
        every = self.backend.all_gather(self.backend.stop_gradient(own), self.group)
        average = xp.mean(every)  # and not a number of replicas, which a trace leaves open
        share = own[0] / xp.where(average > 0, average, 1.0)
        return result._replace(
            training_loss=share * result.training_loss,
            interpretable_loss=share * result.interpretable_loss,
            loss=None if result.loss is None else share * result.loss,
        )

    def _all_gather(self, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: self.backend.all_gather(rows, self.group) for key, rows in value.items()}
        return None if value is None else self.backend.all_gather(value, self.group)

    def _new_items(
        self, name: str, embeddings: Array, features: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Return the rows to insert, checked: one array for each field of the cache."""
        cache = self._caches()[name]
        given = {self.embedding_key: embeddings, **self._stored_features(cache, features)}
        rows, _ = self._managers[name].check_new_items(cache, given)
        rows[self.embedding_key] = self.backend.stop_gradient(rows[self.embedding_key])
        return rows

    def _stored_features(self, cache: NegativeCache, features: Mapping[str, Any]) -> dict[str, Any]:
        """Return those of `features` that the cache stores: all its fields but the embedding."""
        check_mapping(features, "features")
        wanted = [key for key in cache.data if key != self.embedding_key]
        missing = [key for key in wanted if key not in features]
        if missing:
            raise KeysError(
                f"features lack {missing}: the cache stores {wanted} of each item, and features "
                f"have {in_order(features)}."
            )
        return {key: features[key] for key in wanted}

    def _new_items_mask(self, cache: NegativeCache, new_items: dict[str, Array]) -> Array:
        """Return which rows enter: those with a finite embedding that the filter lets through."""
        rows = new_items[self.embedding_key]
        mask = self._finite(rows, cache)
        if self.new_items_filter is not None:
            what, found = "what new_items_filter returned", self.new_items_filter(cache, new_items)
            passed = check_mask(found, rows.shape[0], what, self.backend, like=cache.age)
            mask = mask if passed is None else mask & passed
        return mask

    def _finite(self, embeddings: Array, cache: NegativeCache) -> Array:
        """Return bool (n,): which of (n, D) are finite in the dtype that the cache stores."""
        xp, stored = self.backend.xp, cache.data[self.embedding_key].dtype
        return finite_rows(cast(embeddings, stored, xp), xp=xp)

    def _commit(
        self,
        result: CacheLossReturn,
        embeddings: Mapping[str, Array],
        features: Mapping[str, Mapping[str, Array]],
    ) -> None:
        """Write what a step leaves behind; the new rows were checked."""
        if not isinstance(result, CacheLossReturn):
            raise KindError(
                f"the loss returned, or commit was given, a {type(result).__name__}: expected a "
                "CacheLossReturn."
            )
        with self.backend.no_gradient():
            caches = self._caches()
            # All plans before the first write: a refused update leaves every cache as it was.
            plans = {
                name: self._plan(name, result, embeddings[name], features[name]) for name in caches
            }
            self._report(result)
            self._carry_out(plans, result.training_loss)

    def _carry_out(self, plans: Mapping[str, UpdatePlan | None], *known: Array) -> None:
        """Write what is planned for each cache, None for nothing, and take charge of the result.

        known: what else must not fail before anything is written
        """
        caches = dict(self._caches())
        with self.backend.after((plans, known)):
            for name, plan in plans.items():
                if plan is not None:
                    caches[name] = self._managers[name].carry_out(caches[name], plan)
        self._keep(caches)


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
    if len(spec.shape) != 1 or dtype_kind(spec.dtype) != "floating":
        raise DTypeError(
            f"embedding field {embedding_key!r} of cache {name!r} is {spec}: expected one floating "
            "vector for each row, such as FieldSpec((128,), 'float32')."
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
                f"the handler has {what}={own!r} and its loss {other!r}: give both the same."
            )
    missing = [key for key in _item_keys(cache_loss) if key not in manager.specs]
    if missing:
        raise KeysError(
            f"the loss reads {missing} (id_key, log_frequency_key), which the cache lacks: add the "
            f"field to its specs, {sorted(manager.specs)}."
        )


def _check_backend(part: Any, what: str, backend: Backend) -> None:
    if type(part.backend) is not type(backend):
        raise KindError(
            f"{what} is made for {part.backend.name} and the handler for {backend.name}: take both "
            "from one package."
        )


def _mapping_or_none(value: Any, what: str) -> Mapping[str, Any]:
    """Return a part of a CacheLossReturn that is by name, {} for None."""
    return {} if value is None else check_mapping(value, f"{what} of the loss's result")


def _item_keys(cache_loss: Any) -> tuple[str, ...]:
    """Return the fields that a loss reads of items beside data_keys; another's loss has none."""
    return tuple(getattr(cache_loss, "item_keys", {}).values())


def _refresh_of(result: CacheLossReturn, name: str) -> dict[str, Any]:
    """Return a loss's refresh of one cache as arguments of `plan_update`."""
    return {
        key: _mapping_or_none(getattr(result, key), key).get(name)
        for key in ("updated_item_data", "updated_item_indices", "updated_item_mask")
    }
