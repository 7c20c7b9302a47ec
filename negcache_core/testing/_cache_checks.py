"""Checks of caches: which rows enter, stay and match."""

from typing import Any

import numpy as np

from negcache_core.testing._adapter import Adapter
from negcache_core.testing._scripts import cache_of, compare, items_of, manager_of


def check_manager(adapter: Adapter) -> None:
    """Inserts, refreshes, masks and duplicates leave the same rows and ages."""
    rng = np.random.default_rng(0)
    for case in range(16):
        # Few sizes: some libraries compile each operation for each of them.
        capacity, rows, refreshed = ((6, 4, 5), (6, 6, 5), (1, 1, 5), (6, 0, 0))[case // 4]
        batch: dict[str, Any] = {"new_items": items_of(rng, rows)}
        if case % 3:
            batch["new_items_mask"] = rng.random(rows) < 0.6
        if case % 4:
            data = items_of(rng, refreshed)
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
            return manager_of(side.module, slots, lru).update_cache(cache, **batch)

        compare(adapter, script, cache_of(rng, capacity), batch)


def check_unique(adapter: Adapter) -> None:
    """Repeated items go to their own slots, duplicates collapse, with keys of rank 0 and 1."""
    rng = np.random.default_rng(6)
    for case in range(8):
        # Few sizes: some libraries compile each operation for each of them.
        capacity, rows = ((300, 5), (6, 0), (6, 5))[min(case, 2)]
        key = ("id", "tokens")[case % 2]
        cache = cache_of(rng, capacity)
        batch: dict[str, Any] = {"new_items": items_of(rng, rows)}
        known = rng.random(rows) < 0.6  # the others are new, or duplicates of each other
        some = rng.integers(0, capacity, rows)
        for field in ("id", "tokens"):
            items = batch["new_items"][field]
            items[known] = cache.data[field][some[known]]
        if case % 3:
            batch["new_items_mask"] = rng.random(rows) < 0.7
        if case % 4:
            data = items_of(rng, 2)
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
            return manager_of(side.module, slots, lru, unique_key=key).update_cache(cache, **batch)

        compare(adapter, script, cache, batch)


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

        compare(adapter, script, {}, batch)


def check_top_k(adapter: Adapter) -> None:
    """The best of k contiguous groups, for k that divide the number of columns and that do not."""
    scores = np.random.default_rng(1).standard_normal((3, 7)).round(1)
    for k in (1, 2, 3, 5, 7):

        def script(side: Adapter, state: Any, batch: Any, *, k: int = k) -> Any:
            del state
            return side.module.approximate_top_k_with_indices(batch, k)

        compare(adapter, script, {}, scores)


def check_filter(adapter: Adapter) -> None:
    """Which items are in the cache, with keys of rank 1 and 2; zeros do not match empty slots."""
    rng = np.random.default_rng(2)
    cache = cache_of(rng, 8)
    items = {key: np.concatenate([value[:4], 0 * value[:2]]) for key, value in cache.data.items()}
    for keys in (("id",), ("tokens",), ("id", "tokens")):

        def script(side: Adapter, cache: Any, batch: Any, *, keys: tuple[str, ...] = keys) -> Any:
            return side.module.IsInCacheFilterFn(keys)(cache, batch)

        compare(adapter, script, cache, items)
