"""The scripts of the conformance kit."""

from collections.abc import Callable
from typing import Any

import numpy as np

from negcache_core import exact
from negcache_core.cache.state import EMPTY, NegativeCache
from negcache_core.losses.estimators import ESTIMATORS, Law
from negcache_core.losses.surrogate import positive_weight
from negcache_core.testing._adapter import NUMPY_ADAPTER, Adapter

WIDTH, TOKENS = 4, 3
SPECS = {"tokens": ((TOKENS,), "int64"), "id": ((), "int32"), "embedding": ((WIDTH,), "float64")}
TABLE = np.linspace(-1.0, 1.0, 11 * WIDTH).reshape(11, WIDTH)  # the towers' token embeddings


def _manager(module: Any, capacity: int, use_lru: bool = True, **options: Any) -> Any:
    specs = {key: module.FieldSpec(shape, dtype) for key, (shape, dtype) in SPECS.items()}
    return module.CacheManager(specs, capacity, use_lru, **options)


def _items(rng: Any, rows: int) -> dict[str, Any]:
    return {
        "tokens": rng.integers(0, 11, (rows, TOKENS)),
        "id": rng.integers(0, 5, rows).astype(np.int32),
        "embedding": rng.standard_normal((rows, WIDTH)),
    }


def _cache(rng: Any, capacity: int) -> NegativeCache:
    """Return a cache with some empty slots, zero-filled as the manager leaves them."""
    age = rng.integers(0, 4, capacity).astype(np.int32)
    age[rng.random(capacity) < 0.3] = EMPTY
    rows = _items(rng, capacity)
    return NegativeCache(
        {key: value * _as(age != EMPTY, value) for key, value in rows.items()}, age
    )


def _as(mask: Any, like: Any) -> Any:
    return mask.reshape((-1,) + (1,) * (like.ndim - 1)).astype(like.dtype)


def _embed(adapter: Adapter, features: dict[str, Any]) -> Any:
    """Return the same function of token ids on every library: the mean of their rows of TABLE."""
    xp = adapter.module.CacheManager.backend.xp
    rows = xp.take_rows(adapter.to_native(TABLE), xp.reshape(features["tokens"], (-1,)))
    return xp.mean(xp.reshape(rows, (-1, TOKENS, WIDTH)), axis=1)


def _compare(adapter: Adapter, script: Callable[..., Any], state: Any, batch: Any) -> None:
    """Replay `script(adapter, state, batch)` on both sides and compare all it returns."""

    def bound(side: Adapter) -> Any:
        return side.replay(lambda state, batch: script(side, state, batch), state, batch)

    _assert_equal(adapter.name, "", bound(adapter), bound(NUMPY_ADAPTER))


def _assert_equal(name: str, path: str, given: Any, expected: Any) -> None:
    if isinstance(expected, (dict, tuple)):
        pairs = expected.items() if isinstance(expected, dict) else enumerate(expected)
        for key, value in pairs:
            _assert_equal(name, f"{path}/{key}", given[key], value)
    elif expected is not None:
        message = f"{name} differs from NumPy at {path}"
        np.testing.assert_allclose(
            given, expected, rtol=1e-12, atol=1e-12, err_msg=message, strict=True
        )


def check_manager(adapter: Adapter) -> None:
    """Inserts, refreshes, masks and duplicates leave the same rows and ages."""
    rng = np.random.default_rng(0)
    for case in range(12):
        capacity = int(rng.integers(1, 9))
        rows, refreshed = int(rng.integers(0, capacity + 1)), int(rng.integers(0, 7))
        batch: dict[str, Any] = {"new_items": _items(rng, rows)}
        if case % 3:
            batch["new_items_mask"] = rng.random(rows) < 0.6
        if case % 4:
            data = _items(rng, refreshed)
            batch["updated_item_data"] = {key: data[key] for key in ("embedding", "id")[: case % 4]}
            batch["updated_item_indices"] = rng.integers(-1, capacity + 1, refreshed)
        if case % 4 == 3:
            batch["updated_item_mask"] = rng.random(refreshed) < 0.7

        def script(
            side: Adapter,
            cache: Any,
            batch: Any,
            *,
            lru: bool = bool(case % 2),
            slots: int = capacity,
        ) -> Any:
            return _manager(side.module, slots, lru).update_cache(cache, **batch)

        _compare(adapter, script, _cache(rng, capacity), batch)


def check_unique(adapter: Adapter) -> None:
    """Items that come again go to their own slots, duplicates collapse, on keys of rank 0 and 1."""
    rng = np.random.default_rng(6)
    for case in range(8):
        capacity = int(rng.integers(1, 9)) if case else 300
        rows, key = int(rng.integers(0, min(capacity, 8) + 1)), ("id", "tokens")[case % 2]
        cache = _cache(rng, capacity)
        batch: dict[str, Any] = {"new_items": _items(rng, rows)}
        known = rng.random(rows) < 0.6  # the others are new, or duplicates of one another
        some = rng.integers(0, capacity, rows)
        for field in ("id", "tokens"):
            items = batch["new_items"][field]
            items[known] = cache.data[field][some[known]]
        if case % 3:
            batch["new_items_mask"] = rng.random(rows) < 0.7
        if case % 4:
            data = _items(rng, 2)
            batch["updated_item_data"] = {key: data[key], "embedding": data["embedding"]}
            batch["updated_item_indices"] = rng.integers(-1, capacity + 1, 2)

        def script(
            side: Adapter,
            cache: Any,
            batch: Any,
            *,
            key: str = key,
            lru: bool = case < 4,
            slots: int = capacity,
        ) -> Any:
            return _manager(side.module, slots, lru, unique_key=key).update_cache(cache, **batch)

        _compare(adapter, script, cache, batch)


def check_dtypes(adapter: Adapter) -> None:
    """Fields of every dtype and rank are stored as given."""
    for dtype in adapter.dtypes:
        rows = (np.arange(3 * 4).reshape(3, 2, 2) % 5).astype(dtype)
        batch = {"scalar": rows[:, 0, 0], "vector": rows[:, 0], "matrix": rows}

        def script(side: Adapter, state: Any, batch: Any, *, dtype: str = dtype) -> Any:
            del state
            shapes = {"scalar": (), "vector": (2,), "matrix": (2, 2)}
            specs = {key: side.module.FieldSpec(shapes[key], dtype) for key in shapes}
            manager = side.module.CacheManager(specs, 5)
            cache = manager.update_cache(manager.init_cache(), new_items=batch)
            indices = side.to_native(np.asarray([2, 0, 2]))
            return manager.update_cache(
                cache, updated_item_data={"matrix": batch["matrix"]}, updated_item_indices=indices
            )

        _compare(adapter, script, {}, batch)


def check_top_k(adapter: Adapter) -> None:
    """The best of k contiguous groups, for k that divide the number of columns and that do not."""
    scores = np.random.default_rng(1).standard_normal((3, 7)).round(1)
    for k in (1, 2, 3, 5, 7):

        def script(side: Adapter, state: Any, batch: Any, *, k: int = k) -> Any:
            del state
            return side.module.approximate_top_k_with_indices(batch, k)

        _compare(adapter, script, {}, scores)


def check_filter(adapter: Adapter) -> None:
    """Which items are in the cache, on keys of rank 1 and 2; zeros are not found in empty slots."""
    rng = np.random.default_rng(2)
    cache = _cache(rng, 8)
    items = {key: np.concatenate([value[:4], 0 * value[:2]]) for key, value in cache.data.items()}
    for keys in (("id",), ("tokens",), ("id", "tokens")):

        def script(side: Adapter, cache: Any, batch: Any, *, keys: tuple[str, ...] = keys) -> Any:
            return side.module.IsInCacheFilterFn(keys)(cache, batch)

        _compare(adapter, script, cache, items)


def check_loss(adapter: Adapter) -> None:
    """The same noise draws the same rows and gives the same losses, refresh and metrics."""
    rng = np.random.default_rng(3)
    everything = {"in_batch_negatives": True, "id_key": "id", "log_frequency_key": "log_frequency"}
    for capacities, top_k, draws, options in (
        ((300,), None, 1, {}),
        ((5, 7), None, 2, everything),
        ((5, 7), 5, 3, {}),
        ((300,), 2, 1, {"estimator": "shared"}),
        ((5, 7), 5, 3, {"estimator": "shared", **everything}),
        ((300, 5), None, 2, {"estimator": "exact_query", **everything}),
    ):
        caches = {f"c{i}": _cache(rng, capacity) for i, capacity in enumerate(capacities)}
        for cache in caches.values():
            cache.data["log_frequency"] = rng.standard_normal(len(cache.age))
        rows = 4
        batch = {
            "query": rng.standard_normal((rows, WIDTH)),
            "positive": rng.standard_normal((rows, WIDTH)),
            "noise": rng.random((rows, draws, 2)),
            "features": {
                "tokens": rng.integers(0, 11, (rows, TOKENS)),
                "id": rng.integers(0, 5, rows).astype(np.int32),
                "log_frequency": rng.standard_normal(rows),
            },
            "hard": rng.standard_normal((rows, 2, WIDTH)),
            "weight": rng.random(rows),
        }

        losses = {
            side.name: side.module.CacheClassificationLoss(
                "embedding",
                ("tokens",),
                top_k=top_k,
                scale=3.0,
                num_samples=draws,
                tile_bytes=1,  # the smallest tiles: of 300 slots, two and a rest
                **options,
            )
            for side in (adapter, NUMPY_ADAPTER)
        }

        def script(side: Adapter, caches: Any, batch: Any, *, losses: Any = losses) -> Any:
            loss, query = losses[side.name], batch["query"]
            retrieval = loss.retrieve(
                query, caches, pos_features=batch["features"], noise=batch["noise"]
            )
            negatives = _embed(side, retrieval.features)
            result = loss.loss_from_negatives(
                query,
                batch["positive"],
                negatives,
                retrieval,
                hard_negative_embeddings=batch["hard"],
                sample_weight=batch["weight"],
            )
            return retrieval, result

        _compare(adapter, script, caches, batch)


def check_steps(adapter: Adapter) -> None:
    """A run of handler steps, from an empty cache on, leaves the same state after each step."""
    sides = []
    for side in (adapter, NUMPY_ADAPTER):
        module, rng = side.module, np.random.default_rng(4)
        handler = module.CacheLossHandler(
            _manager(module, 6),
            module.CacheClassificationLoss("embedding", ("tokens",)),
            embedding_key="embedding",
            data_keys=("tokens",),
            new_items_filter=module.IsInCacheFilterFn(("tokens",)),
        )

        def script(cache: Any, batch: Any, *, whole: Any = handler, side: Adapter = side) -> Any:
            handler = whole if side.bind is None else side.bind(whole, cache)
            features = {key: batch[key] for key in ("tokens", "id")}
            retrieval = handler.retrieve(batch["query"], features, noise=batch["noise"])
            negatives = _embed(side, retrieval.features)
            positives = batch["embedding"]
            result = handler.compute_loss(batch["query"], positives, negatives, retrieval)
            handler.commit(result, positives, features)
            return result if side.bind is None else (result, handler.cache)

        history: list[Any] = []
        cache: Any = {} if side.bind is None else side.numpy(_manager(module, 6).init_cache())
        for step in range(6):
            rows = (3, 2, 0, 3, 1, 3)[step]
            batch = {
                **_items(rng, rows),
                "query": rng.standard_normal((rows, WIDTH)),
                "noise": rng.random((rows, 1, 2)),
            }
            if step == 1:
                batch["embedding"][0] = np.nan  # never enters the cache
            result = side.replay(script, cache, batch)
            if side.bind is None:
                result = (result, side.numpy(handler.cache))
            else:
                cache = result[1]
            history.append(result)
        sides.append(tuple(history))
    _assert_equal(adapter.name, "", *sides)


def check_gradients(adapter: Adapter) -> None:
    """Gradients of `loss` and `training_loss` equal those worked out by hand for the draw."""
    if adapter.gradients is None:
        return
    rng = np.random.default_rng(5)
    cache = _cache(rng, 9)
    query, positive = rng.standard_normal((2, 4, WIDTH))
    noise, scale = rng.random((4, 1, 2)), np.asarray(1.7)
    module = adapter.module
    features = {"tokens": rng.integers(0, 11, (4, TOKENS))}
    native = adapter.native(cache)
    fresh = np.asarray(adapter.to_numpy(_embed(adapter, native.data)))

    now: dict[str, Any] = {}
    loss = module.CacheClassificationLoss("embedding", ("tokens",), scale=lambda: now["scale"])

    def retrieve(query: Any, scale: Any) -> Any:
        now["scale"] = scale
        features_, noise_ = adapter.native(features), adapter.to_native(noise)
        return loss.retrieve(query, native, pos_features=features_, noise=noise_)

    drawn = retrieve(adapter.to_native(query), adapter.to_native(scale))
    slots = np.asarray(adapter.to_numpy(drawn.slots))
    arrays = [query, positive, fresh[slots], scale]
    for field in ("loss", "training_loss"):

        def value(
            query: Any, positive: Any, negatives: Any, scale: Any, *, field: str = field
        ) -> Any:
            drawn = retrieve(query, scale)
            return getattr(loss.loss_from_negatives(query, positive, negatives, drawn), field)

        given = adapter.gradients(value, [adapter.to_native(array) for array in arrays])
        law = Law(
            scale * np.sum(query * positive, axis=1),
            np.asarray(adapter.to_numpy(drawn.log_partition)),
            np.asarray(adapter.to_numpy(drawn.drawn)),
        )
        weights = ESTIMATORS["paper"].weigh(law, xp=np)
        miss = positive_weight(law, weights, xp=np)
        expected = exact.surrogate_gradients(
            weights, miss, np.arange(4)[:, None], query, positive, fresh[slots], scale=scale
        )
        _assert_equal(adapter.name, f"gradient of {field}", tuple(given), tuple(expected))


CHECKS: dict[str, Callable[[Adapter], None]] = {
    "manager": check_manager,
    "unique": check_unique,
    "dtypes": check_dtypes,
    "top_k": check_top_k,
    "filter": check_filter,
    "loss": check_loss,
    "steps": check_steps,
    "gradients": check_gradients,
}


def check_adapter(adapter: Adapter) -> None:
    """Run every check; raise AssertionError at the first difference from NumPy."""
    for check in CHECKS.values():
        check(adapter)
