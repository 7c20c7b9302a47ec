"""Upkeep between steps: filling a cache before training, and re-embedding its oldest rows."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from negcache_core.arrays._array import Array, cast
from negcache_core.arrays.validation import as_whole, check_function, embeddings_of
from negcache_core.cache.manager import UpdatePlan
from negcache_core.cache.named import Caches
from negcache_core.cache.plans import oldest_written, plan_reembed
from negcache_core.cache.row_checks import CheckedRows, NewRows, check_rows
from negcache_core.cache.state import EMPTY, NegativeCache
from negcache_core.cache.widths import check_widths
from negcache_core.cache.window import new_window
from negcache_core.errors import CapacityError, KindError, OptionError, ShapeError
from negcache_core.handlers.new_items import entering, finite_as_stored, stored_features
from negcache_core.handlers.setup import Setup
from negcache_core.handlers.step import ItemNetwork, carry_out
from negcache_core.handlers.store import Store
from negcache_core.losses.network import embedded_by

Progress = Callable[[Iterable[Any]], Iterable[Any]]


def refresh(
    setup: Setup, store: Store, names: Sequence[str], item_network: ItemNetwork, n: int
) -> Array:
    """Re-embed n rows in each named cache; nothing is written before everything is planned."""
    count, caches = _whole("n", n, least=0), store.read()
    check_function(item_network, "item_network", "a function of features")
    for name in names:
        capacity = caches[name].age.shape[0]
        if count > capacity:
            raise CapacityError(
                f"n is {count}, but the cache has {capacity} slots: expected at most that many. "
                "Lower n."
            )
    with setup.backend.no_gradient():
        plans: dict[str, UpdatePlan | None] = {}
        left_out: Any = 0
        for name in names:
            plans[name], more = _plan_refresh(setup, caches[name], item_network, count)
            left_out = left_out + more
        carry_out(setup, store, caches, plans)
    return left_out  # an array, if a cache is named


def prefill(
    setup: Setup,
    store: Store,
    features: Mapping[str, Mapping[str, Any]],
    item_network: ItemNetwork,
    batch_size: int,
    progress: Progress | None,
) -> Array:
    """Fill the caches that `features` names."""
    size = _whole("batch_size", batch_size, least=1)
    check_function(item_network, "item_network", "a function of features")
    if progress is not None:
        advice = "a function that wraps an iterable, such as tqdm.tqdm, or None"
        check_function(progress, "progress", advice)
    caches = store.read()
    corpora = {name: _corpus(setup, caches[name], given) for name, given in features.items()}
    batches = [
        _Batch(name, slice(start, min(start + size, total)))
        for name, (_, total) in corpora.items()
        for start in range(0, total, size)
    ]
    left_out: Any = 0
    with setup.backend.no_gradient():
        try:
            for name, part in batches if progress is None else _wrapped(progress, batches):
                rows = {key: value[part, ...] for key, value in corpora[name][0].items()}
                left_out = left_out + _insert(setup, store, name, rows, item_network, part)
        finally:
            _settle(setup, store, corpora)
    return left_out


def reset(setup: Setup, store: Store) -> None:
    """Empty every slot."""
    backend, xp, caches = setup.backend, setup.backend.xp, Caches(store.read())
    with backend.no_gradient():
        for name, (data, age) in caches.items():
            rows = {}
            for key, table in data.items():  # where possible, zeros that take no memory
                zeros = xp.broadcast_to(xp.zeros_like(table[:1, ...]), table.shape)
                rows[key] = backend.overwrite(table, zeros)
            empty = xp.full_like(age, EMPTY, dtype=age.dtype)
            caches[name] = NegativeCache(rows, backend.overwrite(age, empty))
        if caches.window is not None:
            caches.window = backend.overwrite(caches.window, new_window(xp))
        store.write(caches)


def _plan_refresh(
    setup: Setup, cache: NegativeCache, item_network: ItemNetwork, count: int
) -> tuple[UpdatePlan | None, Array]:
    """Return the plan of one cache's refresh, or None, and the rows left out."""
    backend, xp = setup.backend, setup.backend.xp
    age = cast(cache.age, xp.int32, xp)
    slots, live = oldest_written(age, count, xp=xp)
    if count == 0 or backend.truth(xp.any(live)) is False:
        return None, _count(setup, live)
    rows = {key: xp.take_rows(cache.data[key], slots) for key in setup.data_keys}
    embeddings = _embed(setup, cache, item_network, rows, count)
    finite = finite_as_stored(setup, cache, embeddings)
    plan = plan_reembed(age, slots, live, finite, xp=xp)
    write = (plan, {setup.embedding_key: embeddings})
    return UpdatePlan(write, None, plan.age), _count(setup, live & ~finite)


def _corpus(setup: Setup, cache: NegativeCache, features: Any) -> tuple[dict[str, Array], int]:
    """Check the features to fill a cache with; return them in its dtypes, and their number."""
    given = stored_features(setup, cache, features)

    def too_many(total: int, capacity: int) -> CapacityError:
        return CapacityError(
            f"cannot prefill {total} rows into a cache of {capacity} slots: rows would "
            "overwrite one another. Raise cache_size, or pass fewer rows."
        )

    rows, total = check_rows(given, cache, "features", setup.backend, too_many)
    if not isinstance(total, int):
        raise OptionError(
            "features have an unknown number of rows: prefill runs eagerly. Call it outside "
            "tf.function, or give the features a static shape."
        )
    xp = setup.backend.xp
    return {key: cast(row, cache.data[key].dtype, xp) for key, row in rows.items()}, total


def _insert(
    setup: Setup,
    store: Store,
    name: str,
    rows: dict[str, Array],
    item_network: ItemNetwork,
    part: slice,
) -> Array:
    """Embed and insert one batch at age -1, below all others; return the rows left out."""
    caches, count = store.read(), part.stop - part.start
    cache = caches[name]
    inputs = {key: rows[key] for key in setup.data_keys}
    embeddings = _embed(setup, cache, item_network, inputs, count)
    new = CheckedRows({setup.embedding_key: embeddings, **rows})
    new_rows = NewRows(new, count, entering(setup, cache, new))
    write = setup.managers[name].plan_new_items(cache, new_rows)
    carry_out(setup, store, caches, {name: UpdatePlan(None, write, write[0].age)})
    return _count(setup, ~finite_as_stored(setup, cache, embeddings))


def _settle(setup: Setup, store: Store, names: Iterable[str]) -> None:
    """Give the rows of a prefill, at age -1, the age 0.

    They were at -1 so that no batch overwrote the rows of an earlier one, even in a cache that
    held other rows of age 0.
    """
    caches, backend = Caches(store.read()), setup.backend
    for name in names:
        data, age = caches[name]
        caches[name] = NegativeCache(
            data, backend.overwrite(age, backend.xp.where(age < 0, 0, age))
        )
    store.write(caches)


def _embed(
    setup: Setup,
    cache: NegativeCache,
    item_network: ItemNetwork,
    rows: dict[str, Array],
    count: int,
) -> Array:
    """Return embeddings (count, D) as constants, checked."""
    what, key = "the item network's output", setup.embedding_key
    output, table = embedded_by(item_network, rows), cache.data[key]
    try:
        expected = (count, table.shape[1])
        fresh = embeddings_of(output, expected, what, setup.backend, like=cache.age)
    except ShapeError:
        check_widths(table, key, {what: output})
        raise
    fresh = setup.backend.stop_gradient(fresh)
    if setup.mirrored is not None:  # equal even if the network draws random numbers
        fresh = setup.mirrored.gather(fresh)[:count]
    return fresh


def _count(setup: Setup, mask: Array) -> Array:
    xp = setup.backend.xp
    return xp.sum(cast(mask, xp.index_dtype, xp))


class _Batch(NamedTuple):
    name: str
    part: slice


def _wrapped(progress: Progress, batches: list[_Batch]) -> Iterator[_Batch]:
    """Yield the batches through `progress`; raise KindError unless it yields these."""
    wrapped = progress(batches)
    if not isinstance(wrapped, Iterable):
        raise KindError(
            f"progress returned {wrapped!r}: expected an iterable of the batches, as tqdm.tqdm "
            "returns."
        )
    for batch in wrapped:
        if not isinstance(batch, _Batch):
            raise KindError(f"progress yielded {batch!r}: expected the batches that it was given.")
        yield batch


def _whole(what: str, number: Any, *, least: int) -> int:
    """Return `number` as an int; raise unless it is an int of at least `least`."""
    whole = as_whole(number)
    if whole is None:
        raise KindError(f"{what} is {number!r}: expected a plain int, known before any tracing.")
    if whole < least:
        raise OptionError(f"{what} is {number}: expected at least {least}.")
    return whole
