"""Checks of handlers: steps, upkeep, the state after a failure, and saving and loading."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from negcache_core.cache.named import SINGLE
from negcache_core.errors import CapacityError, CheckpointError, ShapeError
from negcache_core.testing._adapter import NUMPY_ADAPTER, Adapter, Tree
from negcache_core.testing._scripts import (
    SLOTS,
    WIDTH,
    act,
    assert_equal,
    assert_raises,
    assert_true,
    both,
    embed,
    half_full,
    handler_of,
    items_of,
    manager_of,
)

ROWS = 3


def check_steps(adapter: Adapter) -> None:
    """Handler steps, starting from an empty cache, give the same state after each step."""
    _check_steps(adapter, "float64", 6)
    _check_steps(adapter, "int8", 2)


def _check_steps(adapter: Adapter, stored: str, steps: int) -> None:
    def script(side: Adapter) -> Iterator[Tree]:
        module, rng = side.module, np.random.default_rng(4)
        manager = manager_of(module, SLOTS, stored=stored)
        handler = module.CacheLossHandler(
            manager,
            module.CacheClassificationLoss("embedding", ("tokens",)),
            embedding_key="embedding",
            data_keys=("tokens",),
            new_items_filter=module.IsInCacheFilterFn(("tokens",)),
        )

        def step(handler: Any, batch: Any) -> Any:
            features = {key: batch[key] for key in ("tokens", "id")}
            retrieval = handler.retrieve(batch["query"], features, noise=batch["noise"])
            negatives = embed(side, retrieval.features)
            positives = batch["embedding"]
            result = handler.compute_loss(batch["query"], positives, negatives, retrieval)
            handler.commit(result, positives, features)
            return result

        cache: Any = side.numpy(manager.init_cache())
        for number in range(steps):
            rows = (3, 2, 0, 3, 2, 3)[number]
            batch = {
                **items_of(rng, rows),
                "query": rng.standard_normal((rows, WIDTH)),
                "noise": rng.random((rows, 1, 2)),
            }
            if number == 1:
                batch["embedding"][0] = np.nan  # never enters the cache
            result, cache = act(side, handler, step, cache, batch)
            yield result, cache

    both(adapter, script)


def _network(side: Adapter, bad: int) -> Callable[[Any], Any]:
    """Return an item network that returns NaN for items with the id `bad`."""
    xp = side.module.CacheManager.backend.xp

    def network(features: Any) -> Any:
        rows = embed(side, features)
        return xp.where((features["id"] == bad)[:, None], float("nan"), rows)

    return network


def _kept_up(side: Adapter, **options: Any) -> Any:
    """Return a handler, without a state if that is explicit, whose item network takes ids too."""
    module = side.module
    return module.CacheLossHandler(
        manager_of(module, SLOTS, **options),
        module.CacheClassificationLoss("embedding", ("tokens", "id")),
        embedding_key="embedding",
        data_keys=("tokens", "id"),
    )


def check_prefill(adapter: Adapter) -> None:
    """A corpus fills the oldest slots, or its items' own; rows that are not finite stay out."""
    held = half_full(10).data["id"][2]  # an item that is in the cache

    def script(side: Adapter) -> Iterator[Tree]:
        for options in ({}, {"unique_key": "id"}, {"use_lru": False}):
            handler = _kept_up(side, **options)
            handler = handler if side.hold is None else side.hold(handler, 0)
            handler.restore(half_full(10))
            corpus = items_of(np.random.default_rng(11), 5)
            corpus["id"] = np.asarray([7, held, 4, 7, 9], np.int32)  # 4 gives NaN
            del corpus["embedding"]
            left_out = handler.prefill(_network(side, bad=4), side.native(corpus), 2)
            yield np.asarray(int(left_out)), side.numpy(handler.cache)

    both(adapter, script)


def check_refresh(adapter: Adapter) -> None:
    """The oldest written rows are re-embedded; those that are not finite come first again."""

    def script(side: Adapter) -> Iterator[Tree]:
        cache = half_full(10)
        cache.data["id"][:] = [1, 0, 2, 4, 0, 3]
        for n in (2, SLOTS):  # the second is more than there are written rows
            handler = _kept_up(side)
            if side.bind is None:
                handler.restore(cache)

            def refresh(handler: Any, batch: Any, *, n: int = n) -> Any:
                del batch
                return handler.refresh(_network(side, bad=4), n)

            left_out, after = act(side, handler, refresh, cache, {})
            yield np.asarray(int(left_out)), after

    both(adapter, script)


class _Twins:
    """Two handlers with equal rows and draws: something happens to one, and not to the other.

    options: of `handler_of`
    """

    def __init__(self, side: Adapter, one: Any, other: Any) -> None:
        self.side, self.one, self.other = side, one, other
        rng = np.random.default_rng(12)
        self.items = side.native(items_of(rng, ROWS))
        self.query = side.native(0.3 * rng.standard_normal((ROWS, WIDTH)))

    def draw(self, handler: Any) -> Any:
        """Return the slots that a handler draws next."""
        return self.side.numpy(handler.retrieve(self.query, self.items).slots[SINGLE])

    def assert_equal(self, what: str) -> None:
        """Raise AssertionError unless rows, ages and the next draws are equal, bit for bit."""
        one, other = (self.side.numpy(each.cache) for each in (self.one, self.other))
        path = f"the cache after {what}"
        assert_equal(self.side.name, path, one, other, tolerance=0)
        path = f"the draw after {what}"
        drawn = self.draw(self.one)
        assert_equal(self.side.name, path, drawn, self.draw(self.other), tolerance=0)
        again = self.draw(self.one)
        self.draw(self.other)
        assert_true((drawn != again).any(), f"{self.side.name} draws the same twice after {what}")


class _Failure(Exception):  # noqa: N818 - what a user's function might raise
    """Raised by the functions that a user passes to a handler."""


def check_rollback(adapter: Adapter) -> None:
    """A step that fails leaves rows, ages and the next draws as they were."""
    failing: set[str] = set()

    def guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def guard(*arguments: Any) -> Any:
            if name in failing:
                raise _Failure(name)
            return function(*arguments)

        return guard

    xp = adapter.module.CacheManager.backend.xp
    reducer = guarded("reducer", xp.mean)
    passing = guarded("filter", adapter.module.IsInCacheFilterFn(("tokens",)))
    handlers = [handler_of(adapter, 3, reducer=reducer, new_items_filter=passing) for _ in range(2)]
    for handler in handlers:
        handler.restore(half_full(13))
    twins = _Twins(adapter, *handlers)

    def network(features: Any) -> Any:
        rows = guarded("network", lambda features: embed(adapter, features))(features)
        return rows[:, : WIDTH - 1] if "shape" in failing else rows

    def step(handler: Any, rows: Any = twins.items, query: Any = twins.query) -> Any:
        features = {key: rows[key] for key in ("tokens", "id")}
        return handler.update_cache_and_compute_loss(network, query, rows["embedding"], features)

    for name, error in (
        ("network", _Failure),
        ("shape", ShapeError),
        ("reducer", _Failure),
        ("filter", _Failure),
    ):
        failing.add(name)
        assert_raises(adapter.name, error, lambda: step(twins.one))
        failing.clear()
        twins.assert_equal(f"a step with a failing {name}")
    rng = np.random.default_rng(14)
    many = adapter.native(items_of(rng, SLOTS + 1))
    queries = adapter.native(rng.standard_normal((SLOTS + 1, WIDTH)))
    assert_raises(adapter.name, CapacityError, lambda: step(twins.one, many, queries))
    twins.assert_equal("a step with more rows than slots")
    losses = [np.asarray(adapter.to_numpy(step(each))) for each in handlers]
    assert_equal(adapter.name, "the loss of the next step", *losses, tolerance=0)
    twins.assert_equal("a step that succeeds")


def check_files(adapter: Adapter) -> None:
    """Loading restores what was saved bit for bit, draws included, here and in NumPy, or fails."""
    with tempfile.TemporaryDirectory() as folder:
        own, numpys, cut = (Path(folder) / name for name in ("own", "numpy", "cut"))
        saved, again = handler_of(adapter, 1), handler_of(adapter, 2)
        saved.restore(half_full(15))
        twins = _Twins(adapter, saved, again)
        twins.draw(saved)  # so that the generator is no longer in the state of its seed
        saved.save(own)
        again.load(own)
        twins.assert_equal("loading")

        whole = own.read_bytes()
        for size in (len(whole) - 1, len(whole) // 2, 4):
            cut.write_bytes(whole[:size])
            assert_raises(adapter.name, CheckpointError, lambda: again.load(cut))
        twins.assert_equal("a file that was cut")

        rows_only, untouched = handler_of(adapter, 5), handler_of(adapter, 5)
        rows_only.load(own, draws=False)
        untouched.restore(half_full(15))
        _Twins(adapter, rows_only, untouched).assert_equal("loading without draws")

        reference = handler_of(NUMPY_ADAPTER)
        reference.load(own, draws=False)
        cache = adapter.numpy(saved.cache)
        assert_equal("NumPy", "a file of the adapter", reference.cache, cache, tolerance=0)
        reference.restore(half_full(16))
        reference.save(numpys)
        again.load(numpys, draws=False)
        cache = adapter.numpy(again.cache)
        assert_equal(adapter.name, "a file of NumPy", cache, reference.cache, tolerance=0)
