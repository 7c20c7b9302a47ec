"""Checks of embeddings stored as int8, each row with its scale."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from negcache_core.cache.state import NegativeCache
from negcache_core.testing._adapter import NUMPY_ADAPTER, Adapter
from negcache_core.testing._scripts import (
    SLOTS,
    TABLE,
    TOKENS,
    WIDTH,
    assert_equal,
    assert_true,
    embed,
    items_of,
)

ROWS = 3
SPECS = {
    "tokens": ((TOKENS,), "int64"),
    "id": ((), "int32"),
    "embedding": ((WIDTH,), "int8"),
    "embedding_scale": ((), "float32"),
}


def check_quantized(adapter: Adapter) -> None:
    """Rows become the codes and scales that NumPy makes of them, and are scored as their values."""
    _check_writes(adapter)
    _check_scores(adapter)
    _check_handler(adapter)


def _manager_of(module: Any) -> Any:
    specs = {key: module.FieldSpec(shape, dtype) for key, (shape, dtype) in SPECS.items()}
    return module.CacheManager(specs, SLOTS)


def _items(rng: Any, rows: int) -> dict[str, Any]:
    items = items_of(rng, rows)
    items["embedding"] = items["embedding"].astype(np.float32)
    return items


def _check_writes(adapter: Adapter) -> None:
    rng = np.random.default_rng(21)
    batch = {**_items(rng, 5), "fresh": rng.standard_normal((2, WIDTH)).astype(np.float32)}
    batch["embedding"][3] = 0.0
    batch["embedding"][4] = np.nan  # masked
    batch["mask"], batch["slots"] = np.arange(5) < 4, np.asarray([2, 0])
    caches: list[Any] = []
    for side in (adapter, NUMPY_ADAPTER):
        manager = _manager_of(side.module)

        def write(_: Any, batch: Any, *, manager: Any = manager) -> Any:
            rows = {key: batch[key] for key in ("tokens", "id", "embedding")}
            cache = manager.update_cache(
                manager.init_cache(), new_items=rows, new_items_mask=batch["mask"]
            )
            return manager.update_cache(
                cache,
                updated_item_data={"embedding": batch["fresh"]},
                updated_item_indices=batch["slots"],
            )

        with np.errstate(invalid="ignore"):
            caches.append(side.replay(write, {}, batch))
    assert_equal(adapter.name, "int8 rows", *caches, tolerance=0)
    values = caches[0].data["embedding"] * caches[0].data["embedding_scale"][:, None]
    expected = np.stack([batch["fresh"][1], batch["embedding"][1], batch["fresh"][0]])
    most = np.abs(expected).max(axis=1, keepdims=True) / 253
    assert_true(bool((np.abs(values[:3] - expected) < most).all()), "values are within half a code")


def _check_scores(adapter: Adapter) -> None:
    rng = np.random.default_rng(22)
    batch = {
        "query": rng.standard_normal((ROWS, WIDTH)).astype(np.float32),
        "positive": rng.standard_normal((ROWS, WIDTH)).astype(np.float32),
        "noise": rng.random((ROWS, 2, 2)),
    }
    coded: dict[str, Any] = {
        "tokens": rng.integers(0, 11, (300, TOKENS)),
        "embedding": rng.integers(-127, 128, (300, WIDTH)).astype(np.int8),
        "embedding_scale": rng.random(300).astype(np.float32) / 100,
    }
    values = coded["embedding"] * coded["embedding_scale"][:, None]
    plain = {"tokens": coded["tokens"], "embedding": values}
    age = rng.integers(0, 4, 300).astype(np.int32)
    results = []
    for side, data in ((adapter, coded), (NUMPY_ADAPTER, coded), (NUMPY_ADAPTER, plain)):
        loss = side.module.CacheClassificationLoss(
            "embedding",
            ("tokens",),
            scale=2.0,
            num_samples=2,
            estimator="exact_query",
            in_batch_negatives=True,
            tile_bytes=1,
        )

        def read(cache: Any, batch: Any, *, side: Adapter = side, loss: Any = loss) -> Any:
            xp = loss.backend.xp
            data, age = cache
            cache = NegativeCache(data, age)
            drawn = loss.retrieve(batch["query"], cache, noise=batch["noise"])
            negatives = xp.astype(embed(side, drawn.features), xp.float32)
            result = loss.loss_from_negatives(batch["query"], batch["positive"], negatives, drawn)
            facts = drawn.slots, drawn.log_partition, drawn.stale_embeddings, drawn.readout
            return facts, result.loss, result.updated_item_data, result.metrics

        results.append(side.replay(read, (data, age), batch))
    for expected in results[1:]:
        assert_equal(adapter.name, "the loss of int8 rows", results[0], expected, tolerance=2e-6)


def _check_handler(adapter: Adapter) -> None:
    """A handler adds the scales by itself; its files hold them, and convert to and from float32."""
    module, rng = adapter.module, np.random.default_rng(23)

    def handler_of(dtype: str) -> Any:
        specs = {
            "tokens": module.FieldSpec((TOKENS,), "int64"),
            "embedding": module.FieldSpec((WIDTH,), dtype),
        }
        seeded = {} if adapter.hold is not None else {"generator": 1}
        loss = module.CacheClassificationLoss("embedding", ("tokens",), scale=2.0, **seeded)
        handler = module.CacheLossHandler(module.CacheManager(specs, SLOTS), loss)
        return handler if adapter.hold is None else adapter.hold(handler, 1)

    def network(features: Any) -> Any:
        xp = module.CacheManager.backend.xp
        return xp.astype(embed(adapter, features), xp.float32)

    handler = handler_of("int8")
    for _ in range(3):
        tokens = adapter.to_native(rng.integers(0, 11, (ROWS, TOKENS)))
        query = adapter.to_native(rng.standard_normal((ROWS, WIDTH)).astype(np.float32))
        handler(network, query, network({"tokens": tokens}), {"tokens": tokens})
    held = adapter.numpy(handler.cache)
    values = held.data["embedding"] * held.data["embedding_scale"][:, None]
    expected = TABLE[held.data["tokens"]].mean(axis=1)
    most = np.abs(expected).max(axis=1, keepdims=True) / 253
    assert_true(bool((np.abs(values - expected) < most).all()), "rows are those of the network")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cache.safetensors"
        handler.save(path)
        other = handler_of("int8")
        other.load(path)
        assert_equal(
            adapter.name, "loaded int8 rows", adapter.numpy(other.cache), held, tolerance=0
        )
        plain = handler_of("float32")
        plain.load(path)
        given = adapter.numpy(plain.cache).data["embedding"]
        assert_equal(adapter.name, "int8 rows loaded as float32", given, values, tolerance=0)
        plain.save(path)
        other.load(path)
        given = adapter.numpy(other.cache).data["embedding"]
        assert_equal(
            adapter.name,
            "float32 rows loaded as int8",
            given,
            held.data["embedding"],
            tolerance=0,
        )
