"""A step: retrieve, embed, loss, commit.

The cache is written last, after everything that can fail, so an exception anywhere leaves it as it
was.
"""

from collections.abc import Callable, Mapping
from typing import Any

from negcache_core.arrays._array import Array
from negcache_core.arrays.backend import Backend
from negcache_core.arrays.validation import as_array, check_function, check_mapping
from negcache_core.cache.manager import UpdatePlan
from negcache_core.cache.named import Caches
from negcache_core.cache.row_checks import NewRows, check_refresh
from negcache_core.cache.window import next_window
from negcache_core.errors import KindError
from negcache_core.handlers.new_items import check_batch, entering, stand_in, stand_in_of
from negcache_core.handlers.setup import Setup
from negcache_core.handlers.store import Store
from negcache_core.losses.classification import CacheClassificationLoss
from negcache_core.losses.results import CacheLossReturn

ItemNetwork = Callable[[dict[str, Any]], Array]


def run_step(
    setup: Setup,
    store: Store,
    item_network: ItemNetwork,
    query_embeddings: Array,
    pos_item_embeddings: Array,
    embeddings: Mapping[str, Array],
    features: Mapping[str, Mapping[str, Array]],
    options: Mapping[str, Any],
) -> Array:
    """Run a complete step; `embeddings` and `features` are the new rows by cache name.

    options: further arguments of the loss
    """
    loss, caches = setup.loss, store.read()
    setup.backend.begin_step()
    phased = isinstance(loss, CacheClassificationLoss)
    if phased:  # a user's own loss may take no network
        check_function(item_network, "item_network", "a function of features")
    new = check_batch(setup, caches, embeddings, features, query_embeddings)
    arguments = {
        "doc_network": item_network,
        "query_embeddings": query_embeddings,
        "pos_doc_embeddings": pos_item_embeddings,
        "cache": caches,
        **options,
    }
    if isinstance(loss, CacheClassificationLoss):
        arguments["pos_features"] = stand_in_of(new)
        with loss.undone_on_error():
            result = setup.weighted(loss(**arguments), query_embeddings)
            commit(setup, store, result, new)
    else:
        arguments["cache"] = dict(caches)  # to a loss inside it they are a user's
        result = check_result(loss(**arguments), setup.backend)
        result = setup.weighted(result, query_embeddings)
        commit(setup, store, result, new)
    return to_differentiate(result)


def to_differentiate(result: CacheLossReturn) -> Array:
    """Return what a training loop logs and differentiates; a user's loss may have one value."""
    value: Array = result.training_loss if result.loss is None else result.loss
    return value


def evaluate(
    setup: Setup,
    store: Store,
    item_network: ItemNetwork | None,
    query_embeddings: Array,
    pos_item_embeddings: Array,
    features: Mapping[str, Mapping[str, Array]],
    options: Mapping[str, Any],
) -> CacheLossReturn:
    """Return the loss against the current caches; nothing is written."""
    loss, caches = setup.loss, store.read()
    if isinstance(loss, CacheClassificationLoss):
        positives = stand_in(setup, caches, features)
        result = loss.evaluate(
            item_network,
            query_embeddings,
            pos_item_embeddings,
            caches,
            pos_features=positives,
            **options,
        )
    else:
        result = check_result(
            loss(
                doc_network=item_network,
                query_embeddings=query_embeddings,
                pos_doc_embeddings=pos_item_embeddings,
                cache=dict(caches),
                **options,
            ),
            setup.backend,
        )
    return setup.weighted(result, query_embeddings)


def check_result(result: Any, backend: Backend) -> CacheLossReturn:
    """Return what a user's loss returned, or a user passes, with its metrics as arrays."""
    if not isinstance(result, CacheLossReturn):
        raise KindError(
            f"the loss returned, or commit was given, a {type(result).__name__}: expected a "
            "CacheLossReturn."
        )
    if result.metrics is None:
        return result
    metrics = check_mapping(result.metrics, "metrics of the loss's result")
    arrays = {key: as_array(value, f"metrics[{key!r}]", backend) for key, value in metrics.items()}
    return result._replace(metrics=arrays)


def commit(setup: Setup, store: Store, result: CacheLossReturn, new: Mapping[str, NewRows]) -> None:
    """Write a step's results: the fresh embeddings, and the new rows, checked before."""
    with setup.backend.no_gradient():
        caches = store.read()
        # All plans before the first write: a refused update leaves every cache as it was.
        plans = {name: _plan(setup, caches, name, result, new[name]) for name in caches}
        window = _next_window(setup, caches.window, result.drift)
        setup.report(result)
        carry_out(setup, store, caches, plans, result.training_loss, window=window)


def carry_out(
    setup: Setup,
    store: Store,
    caches: Caches,
    plans: Mapping[str, UpdatePlan | None],
    *known: Array,
    window: Array | None = None,
) -> None:
    """Write what is planned for each of the store's caches; None means nothing.

    known:  what else must be computed without an error before anything is written
    window: its next state; None keeps the present one
    """
    caches = Caches(caches)
    with setup.backend.after((plans, known, window)):
        if window is not None:
            caches.window = setup.backend.overwrite(caches.window, window)
        for name, plan in plans.items():
            if plan is not None:
                caches[name] = setup.managers[name].carry_out(caches[name], plan)
    store.write(caches)


def _plan(
    setup: Setup, caches: Caches, name: str, result: CacheLossReturn, new: NewRows
) -> UpdatePlan:
    """Plan the update of one cache; nothing is written."""
    cache, manager = caches[name], setup.managers[name]
    new = new._replace(mask=entering(setup, cache, new.rows))
    if manager.unique_key is not None:
        new = setup.placement.bring_home(new, cache, manager.unique_key, setup.backend.xp)
    refresh = check_refresh(
        _part(result.updated_item_data, "updated_item_data", name),
        _part(result.updated_item_indices, "updated_item_indices", name),
        _part(result.updated_item_mask, "updated_item_mask", name),
        cache,
        setup.backend,
    )
    if setup.mirrored is not None:
        refresh, new = setup.mirrored.refresh(refresh), setup.mirrored.new_rows(new)
    return manager.plan_update(cache, refresh, new)


def _next_window(setup: Setup, window: Any, drift: Any) -> Array | None:
    """Return the window's state after a step; None keeps the present one."""
    if window is None or drift is None:
        return None
    xp = setup.backend.xp
    drift = setup.placement.total(drift, xp)
    if setup.mirrored is not None:
        drift = xp.sum(setup.mirrored.gather(drift[None, :]), axis=0)
    loss: Any = setup.loss
    return next_window(window, drift, loss.max_staleness, xp)


def _part(value: Any, what: str, name: str) -> Any:
    """Return one cache's part of a CacheLossReturn with caches by name; None for None."""
    return None if value is None else check_mapping(value, f"{what} of the loss's result").get(name)
