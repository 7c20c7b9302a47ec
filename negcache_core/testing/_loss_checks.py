"""Checks of the loss: its draws and values, in double and in half precision."""

from typing import Any

import ml_dtypes
import numpy as np

from negcache_core.testing._adapter import NUMPY_ADAPTER, Adapter
from negcache_core.testing._scripts import (
    SLOTS,
    TOKENS,
    WIDTH,
    assert_equal,
    cache_of,
    compare,
    embed,
)

HALF = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def check_loss(adapter: Adapter) -> None:
    """The same noise draws the same rows and gives the same losses, refresh and metrics."""
    rng = np.random.default_rng(3)
    everything = {
        "in_batch_negatives": True,
        "id_keys": ("id", "owner"),
        "group_key": "group",
        "margin": 0.3,
        "log_frequency_key": "log_frequency",
    }
    widths = {"matryoshka_dims": (WIDTH, 1), "matryoshka_weights": (2.0, 0.5)}
    for capacities, top_k, draws, options in (
        ((300,), None, 1, {}),
        ((5, 7), None, 2, everything),
        ((5, 7), 5, 2, {}),
        ((300,), 2, 1, {"estimator": "shared"}),
        ((5, 7), 5, 2, {"estimator": "shared", **everything}),
        ((300, 5), None, 2, {"estimator": "exact_query", **everything}),
        ((300, 5), None, 2, {"estimator": "exact_query", **widths, **everything}),
        ((300,), None, 1, {"estimator": "shared", **widths}),
    ):
        caches = {f"c{i}": cache_of(rng, capacity) for i, capacity in enumerate(capacities)}
        for cache in caches.values():
            cache.data["log_frequency"] = rng.standard_normal(len(cache.age))
            cache.data["owner"] = rng.integers(0, 9, len(cache.age))
            cache.data["group"] = rng.integers(0, 2, len(cache.age)).astype(np.int32)
        rows = 4
        batch = {
            "query": rng.standard_normal((rows, WIDTH)),
            "positive": rng.standard_normal((rows, WIDTH)),
            "noise": rng.random((rows, draws, 2)),
            "features": {
                "tokens": rng.integers(0, 11, (rows, TOKENS)),
                "id": rng.integers(0, 5, rows).astype(np.int32),
                "owner": rng.integers(0, 9, rows),
                "group": rng.integers(0, 2, rows).astype(np.int32),
                "log_frequency": rng.standard_normal(rows),
            },
            "hard_features": {
                "id": rng.integers(0, 5, (rows, 2)).astype(np.int32),
                "owner": rng.integers(0, 9, (rows, 2)),
                "group": rng.integers(0, 2, (rows, 2)).astype(np.int32),
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
                tile_bytes=1,  # the smallest tiles: 300 slots are two of them and a remainder
                **options,
            )
            for side in (adapter, NUMPY_ADAPTER)
        }

        def script(side: Adapter, caches: Any, batch: Any, *, losses: Any = losses) -> Any:
            loss, query = losses[side.name], batch["query"]
            retrieval = loss.retrieve(
                query,
                caches,
                pos_features=batch["features"],
                pos_doc_embeddings=batch["positive"],
                noise=batch["noise"],
            )
            negatives = embed(side, retrieval.features)
            result = loss.loss_from_negatives(
                query,
                batch["positive"],
                negatives,
                retrieval,
                hard_negative_embeddings=batch["hard"],
                hard_negative_features=batch["hard_features"],
                sample_weight=batch["weight"],
            )
            # Cross scores have another type if sizes are traced.
            if retrieval.pool is not None:
                retrieval = retrieval._replace(pool=retrieval.pool._replace(cross_scores=None))
            return retrieval, result

        compare(adapter, script, caches, batch)


def check_half(adapter: Adapter) -> None:
    """Rows of half precision are rounded as NumPy rounds them, and scored in float32."""
    rng = np.random.default_rng(9)
    batch = {
        "tokens": rng.integers(0, 11, (SLOTS, TOKENS)),
        "embedding": rng.standard_normal((SLOTS, WIDTH)).astype(np.float32),
        "query": rng.standard_normal((3, WIDTH)).astype(np.float32),
        "positive": rng.standard_normal((3, WIDTH)).astype(np.float32),
        "noise": rng.random((3, 2, 2)),
    }
    for dtype in ("float16", "bfloat16"):
        if not hasattr(adapter.module.CacheManager.backend.xp, dtype):
            continue
        caches, results = [], []
        for side in (adapter, NUMPY_ADAPTER):
            module = side.module
            specs = {
                "tokens": module.FieldSpec((TOKENS,), "int64"),
                "embedding": module.FieldSpec((WIDTH,), HALF[dtype]),
            }
            manager = module.CacheManager(specs, SLOTS)
            loss = module.CacheClassificationLoss(
                "embedding", ("tokens",), scale=2.0, num_samples=2, in_batch_negatives=True
            )

            def write(_: Any, batch: Any, *, manager: Any = manager) -> Any:
                rows = {key: batch[key] for key in ("tokens", "embedding")}
                return manager.update_cache(manager.init_cache(), new_items=rows)

            def read(cache: Any, batch: Any, *, side: Adapter = side, loss: Any = loss) -> Any:
                xp = loss.backend.xp
                drawn = loss.retrieve(batch["query"], cache, noise=batch["noise"])
                negatives = xp.astype(embed(side, drawn.features), xp.float32)
                result = loss.loss_from_negatives(
                    batch["query"], batch["positive"], negatives, drawn
                )
                return drawn.slots, drawn.log_partition, result.loss, result.metrics

            native = side.native(batch)
            cache = side.run(write, {}, native)  # a separate program: it returns half arrays
            caches.append(np.asarray(side.to_numpy(cache.data["embedding"])).astype(np.float32))
            results.append(side.numpy(side.run(read, cache, native)))
        assert_equal(adapter.name, f"{dtype} rows", *caches, tolerance=0)
        assert_equal(adapter.name, f"loss of {dtype} rows", *results, tolerance=1e-6)
