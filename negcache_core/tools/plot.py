"""A picture of a cache: how old its rows are, how stale, and how many of them compete."""

import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from negcache_core.arrays._array import Array
from negcache_core.arrays.validation import as_whole, check_function, embeddings_of, in_order
from negcache_core.cache.named import SINGLE
from negcache_core.cache.quantized import embeddings_at
from negcache_core.cache.state import EMPTY, NegativeCache
from negcache_core.errors import KeysError, KindError, OptionError
from negcache_core.handlers.cache_loss_handler import CacheLossHandler
from negcache_core.handlers.multi_cache_loss_handler import MultiCacheLossHandler
from negcache_core.losses.metrics import staleness

METRIC = "effective_negatives"


_BINS = 12


_COLOURS = ("#2563eb", "#ea580c", "#16a34a", "#ca8a04", "#9333ea", "#475569")


_INK, _PALE = "#334155", "#cbd5e1"


# White behind dark ink: legible wherever a figure is put.
_STYLE = {
    "axes.edgecolor": _PALE,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.labelcolor": _INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 11,
    "font.size": 9,
    "grid.color": _PALE,
    "grid.linewidth": 0.5,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
}


class Aged(NamedTuple):
    """Rows (n,) of a cache, youngest first: how old they are, in update steps, and how stale."""

    age: Any
    staleness: Any


def plot_cache(
    handler: CacheLossHandler | MultiCacheLossHandler,
    item_network: Callable[[dict[str, Any]], Array] | None = None,
    history: Mapping[int, Mapping[str, Any]] | None = None,
    *,
    rows: int = 1_024,
) -> Any:
    """Plot a handler's cache as it is now; return a matplotlib Figure, for `.savefig(path)`.

    handler:      a handler that holds its state: in JAX `handler.bind(state)`
    item_network: a function of features by field, rows of the cache, that returns embeddings (n,
                  D). If given, `rows` written rows, evenly spread from the youngest to the oldest,
                  are embedded again, and |stale - fresh|^2 / |fresh|^2 is plotted over their ages,
                  with its median. Nothing is written. Put a tower with dropout into evaluation mode
                  first.
    history:      step -> that step's metrics, to plot the effective number of negatives. Fill it in
                  the training loop: `history[step] = handler.metrics`
    rows:         the most rows to embed, of each cache

    The first panel is a histogram of ages. In a sound cache rows leave at about the same age; a
    second hump far to the right means rows that nothing draws or replaces. `docs/metrics.md` shows
    what bad looks like. For a cache in shards it plots the shard of this process.

    Needs matplotlib (`pip install 'negcache[plot]'`), and raises ImportError without. Raises
    KindError for a handler that holds no cache and for a history of another form, KeysError for
    metrics without that number, OptionError unless rows >= 1, and ShapeError or DTypeError for a
    wrong output of the network.

    >>> import numpy as np
    >>> from negcache_core import CacheClassificationLoss, CacheLossHandler, CacheManager, FieldSpec
    >>> specs = {"x": FieldSpec((1,), "float32"), "embedding": FieldSpec((1,), "float32")}
    >>> handler = CacheLossHandler(
    ...     CacheManager(specs, cache_size=4), CacheClassificationLoss("embedding", ("x",)),
    ...     embedding_key="embedding", data_keys=("x",))
    >>> x = np.asarray([[1.0], [2.0], [3.0]], dtype=np.float32)
    >>> _ = handler.prefill(lambda features: features["x"], {"x": x}, batch_size=3)
    >>> figure = plot_cache(handler, lambda features: 2 * features["x"])
    >>> [axes.get_title() for axes in figure.axes]
    ['age of rows: 75% of 4 slots', 'staleness by age: median 0.25']
    """
    caches = _caches_of(handler)
    steps = None if history is None else _checked_history(history)
    count = as_whole(rows)
    if count is None or count < 1:
        raise OptionError(f"rows is {rows!r}: expected how many rows to embed, 1 or more.")
    if item_network is not None:
        check_function(item_network, "item_network", "a function of features")
    mpl = _matplotlib()
    panels = 1 + (item_network is not None) + (steps is not None)
    with mpl.rc_context(_STYLE):
        figure = mpl.figure.Figure(figsize=(4.5 * panels, 3.4), layout="constrained")
        first, *others = figure.subplots(1, panels, squeeze=False)[0]
        _draw_ages(first, {name: _host_ages(handler, cache) for name, cache in caches.items()})
        if item_network is not None:
            aged = {
                name: stale_rows(handler, cache, item_network, count)
                for name, cache in caches.items()
            }
            _draw_staleness(others.pop(0), aged)
        if steps is not None:
            _draw_history(others.pop(0), steps)
    return figure


def stale_rows(
    handler: CacheLossHandler | MultiCacheLossHandler,
    cache: NegativeCache,
    item_network: Callable[[dict[str, Any]], Array],
    count: int,
) -> Aged:
    """Embed at most `count` written rows again, evenly spread over the order of their ages.

    Rows whose fresh embedding is not finite are left out.
    """
    backend, xp, key = handler.backend, handler.backend.xp, handler.embedding_key
    ages = _host_ages(handler, cache)
    order = np.argsort(ages, kind="stable")[: int((ages != EMPTY).sum())]
    if len(order) == 0:
        return Aged(ages[:0], np.zeros(0))
    chosen = order[np.linspace(0, len(order) - 1, min(count, len(order))).astype(np.int64)]
    with backend.no_gradient():
        slots = xp.astype(backend.to_array(chosen), xp.index_dtype)
        features = {field: xp.take_rows(cache.data[field], slots) for field in handler.data_keys}
        fresh = embeddings_of(
            item_network(features),
            (len(chosen), cache.data[key].shape[1]),
            "the item network's output",
            backend,
            like=cache.age,
        )
        stale = embeddings_at(cache.data, key, slots, xp)
        pair = (backend.to_host(each).astype(np.float64) for each in (stale, fresh))
        found: Any = staleness(*pair, xp=np)
    finite = np.isfinite(found)
    return Aged(ages[chosen][finite], found[finite])


def _draw_ages(axes: Any, ages: Mapping[str, Any]) -> None:
    written = {name: each[each != EMPTY] for name, each in ages.items()}
    oldest = max((int(each.max()) for each in written.values() if len(each)), default=0)
    edges = np.linspace(-0.5, oldest + 0.5, min(oldest + 1, 40) + 1)
    for (name, each), colour in zip(written.items(), itertools.cycle(_COLOURS), strict=False):
        axes.hist(each, edges, color=colour, alpha=0.75, label=name)
    slots = sum(map(len, ages.values()))
    fill = sum(map(len, written.values())) / slots
    axes.set(
        title=f"age of rows: {fill:.0%} of {slots:,} slots",
        xlabel="age, in update steps",
        ylabel="rows",
    )
    _legend(axes, written)


def _draw_staleness(axes: Any, aged: Mapping[str, Aged]) -> None:
    for (name, rows), colour in zip(aged.items(), itertools.cycle(_COLOURS), strict=False):
        axes.plot(rows.age, rows.staleness, ".", color=colour, alpha=0.25, markersize=4)
        parts = [part for part in np.array_split(np.arange(len(rows.age)), _BINS) if len(part)]
        middle = ([np.median(each[part]) for part in parts] for each in rows)
        axes.plot(*middle, color=colour, label=name)
    every = np.concatenate([rows.staleness for rows in aged.values()])
    median = f"median {np.median(every):.2g}" if len(every) else "no rows"
    axes.set(
        title=f"staleness by age: {median}",
        xlabel="age, in update steps",
        ylabel="|stale - fresh|² / |fresh|²",
    )
    axes.set_ylim(bottom=0)
    _legend(axes, aged)


def _draw_history(axes: Any, steps: Mapping[int, float]) -> None:
    axes.plot(list(steps), list(steps.values()), color=_COLOURS[0])
    last = f"{list(steps.values())[-1]:.1f} in the last step" if steps else "no steps"
    axes.set(title=f"effective negatives: {last}", xlabel="step", ylabel="exp of mean entropy")
    axes.set_ylim(bottom=0)


def _legend(axes: Any, named: Mapping[str, Any]) -> None:
    if len(named) > 1:
        axes.legend(frameon=False)


def _host_ages(handler: CacheLossHandler | MultiCacheLossHandler, cache: NegativeCache) -> Any:
    return handler.backend.to_host(cache.age).astype(np.int64)


def _caches_of(handler: Any) -> dict[str, NegativeCache]:
    if not isinstance(handler, CacheLossHandler | MultiCacheLossHandler):
        raise KindError(
            f"handler is a {type(handler).__name__}: expected a CacheLossHandler or a "
            "MultiCacheLossHandler."
        )
    cache = handler.cache
    return {SINGLE: cache} if isinstance(cache, NegativeCache) else cache


def _checked_history(history: Any) -> dict[int, float]:
    if not isinstance(history, Mapping):
        raise KindError(f"history is a {type(history).__name__}: expected a dict, step -> metrics.")
    found = {}
    for step, metrics in history.items():
        what, number = f"history[{step!r}]", as_whole(step)
        if number is None or not isinstance(metrics, Mapping):
            raise KindError(f"{what} is a {type(metrics).__name__}: expected int -> metrics.")
        if METRIC not in metrics:
            raise KeysError(f"{what} has {in_order(metrics)}: expected the metric {METRIC!r}.")
        try:
            found[number] = float(metrics[METRIC])
        except Exception as error:  # each library raises something else
            raise KindError(f"{what} has {metrics[METRIC]!r}: expected a number.") from error
    return dict(sorted(found.items()))


def _matplotlib() -> Any:
    try:
        import matplotlib as mpl  # noqa: PLC0415 - drawing is optional
        import matplotlib.figure  # noqa: PLC0415
    except ImportError as error:
        raise ImportError(
            "plot_cache draws with matplotlib, which is not installed: "
            "pip install 'negcache[plot]'."
        ) from error
    return mpl
