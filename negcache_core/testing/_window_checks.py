"""Checks of the window of ages: it hides older rows, and follows the towers' drift."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from negcache_core.cache.named import Caches
from negcache_core.cache.state import EMPTY
from negcache_core.losses.estimators import ESTIMATORS
from negcache_core.testing._adapter import Adapter, Tree
from negcache_core.testing._scripts import (
    SLOTS,
    TOKENS,
    WIDTH,
    act,
    assert_equal,
    both,
    cache_of,
    embed,
    half_full,
    handler_of,
    items_of,
    manager_of,
)

LIMIT = 0.2


def check_window(adapter: Adapter) -> None:
    """A row older than the window does not count, as if its slot were empty."""
    rng, rows = np.random.default_rng(21), 4
    caches = {"a": cache_of(rng, 150), "b": cache_of(rng, 7)}
    for cache in caches.values():
        cache.age[cache.age < EMPTY] = rng.integers(0, 9, np.sum(cache.age < EMPTY))
    window = np.asarray([3.5, 0.0, 0.0, 0.0, 0.0, 0.0], np.float32)
    youngest = {
        name: cache._replace(age=np.where(cache.age <= 3, cache.age, EMPTY).astype(np.int32))
        for name, cache in caches.items()
    }
    batch = {
        "query": rng.standard_normal((rows, WIDTH)),
        "positive": rng.standard_normal((rows, WIDTH)),
        "noise": rng.random((rows, 2, 2)),
        "features": {
            "tokens": rng.integers(0, 11, (rows, TOKENS)),
            "id": rng.integers(0, 5, rows).astype(np.int32),
        },
    }
    for estimator in ESTIMATORS:
        losses = {
            windowed: adapter.module.CacheClassificationLoss(
                "embedding",
                ("tokens",),
                estimator=estimator,
                num_samples=2,
                in_batch_negatives=True,
                id_keys=("id",),
                max_staleness=LIMIT if windowed else None,
                tile_bytes=1,
            )
            for windowed in (False, True)
        }

        def script(state: Any, batch: Any, *, losses: Any = losses) -> Any:
            caches, loss = state["caches"], losses["window" in state]
            if "window" in state:
                caches = Caches(caches, state["window"])
            given = {"pos_features": batch["features"], "noise": batch["noise"]}
            drawn = loss.retrieve(batch["query"], caches, **given)
            negatives = embed(adapter, drawn.features)
            out = loss.loss_from_negatives(batch["query"], batch["positive"], negatives, drawn)
            metrics = {key: out.metrics[key] for key in ("staleness", "mean_weight")}
            found = (drawn.slots, drawn.owned, drawn.ages, drawn.log_partition, drawn.pool)
            return found, out.training_loss, out.interpretable_loss, metrics

        given = adapter.replay(script, {"caches": caches, "window": window}, batch)
        expected = adapter.replay(script, {"caches": youngest}, batch)
        path = f"{estimator} with a window"
        assert_equal(adapter.name, path, given, expected, tolerance=1e-12)


def check_drift(adapter: Adapter) -> None:
    """The window after one step, and over many steps, equals NumPy's."""

    def one_step(side: Adapter) -> Iterator[Tree]:
        """One step, from caches with different ages, perhaps traced."""
        module, rng = side.module, np.random.default_rng(23)
        loss = module.CacheClassificationLoss("embedding", ("tokens",), max_staleness=LIMIT)
        handler = module.CacheLossHandler(manager_of(module, SLOTS), loss)

        def step(handler: Any, batch: Any) -> Any:
            features = {key: batch[key] for key in ("tokens", "id")}
            drawn = handler.retrieve(batch["query"], features, noise=batch["noise"])
            positive = batch["embedding"]
            result = handler.compute_loss(
                batch["query"], positive, embed(side, drawn.features), drawn
            )
            handler.commit(result, positive, features)
            window = handler._store.read().window  # noqa: SLF001 - no other way to see its sums
            return result.drift, result.metrics["window"], window + 0.0

        empty: Any = side.numpy(manager_of(module, SLOTS).init_cache())
        for cache in (empty, half_full(24), half_full(25)):
            if side.bind is None:
                handler.reset()
                handler.restore(cache)
            batch = {
                **items_of(rng, 3),
                "query": rng.standard_normal((3, WIDTH)),
                "noise": rng.random((3, 1, 2)),
            }
            yield act(side, handler, step, cache, batch)

    both(adapter, one_step, tolerance=1e-5)

    def many_steps(side: Adapter) -> Iterator[Tree]:
        """Many steps, in which a tower drifts and finally stops."""
        rng = np.random.default_rng(26)
        handler = handler_of(side, max_staleness=LIMIT)
        for number in range(12):
            drift = 1.0 + 0.2 * min(number, 6)

            def network(features: Any, *, drift: float = drift) -> Any:
                return drift * embed(side, features)

            rows = side.native({**items_of(rng, 3), "query": rng.standard_normal((3, WIDTH))})
            noise = side.to_native(rng.random((3, handler.cache_loss.num_samples, 2)))
            features = {key: rows[key] for key in ("tokens", "id")}
            handler.update_cache_and_compute_loss(
                network, rows["query"], network(features), features, noise=noise
            )
            yield side.numpy(handler._store.read().window)  # noqa: SLF001 - as above

    both(adapter, many_steps, tolerance=1e-4)
