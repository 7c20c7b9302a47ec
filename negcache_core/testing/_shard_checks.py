"""Checks of a cache that is split into shards, one per replica: it equals one big cache."""

from typing import Any

import numpy as np

from negcache_core.cache.state import EMPTY
from negcache_core.losses.estimators import ESTIMATORS
from negcache_core.testing._adapter import Adapter, Tree
from negcache_core.testing._scripts import (
    WIDTH,
    assert_equal,
    assert_true,
    embed,
    items_of,
    manager_of,
)

SHARDS = (4, 4, 2)
SIZES = ((2, 0, 1), (1, 2, 0), (0, 1, 2))  # rows of each replica, step by step
UNIQUE = {"capacity": 12, "unique_key": "id"}  # any shard could take all rows of a step
MATRYOSHKA = {
    "matryoshka_dims": (1, WIDTH),
    "matryoshka_weights": (0.5, 2.0),
    "in_batch_negatives": True,
    "id_key": "id",
    "margin": 0.5,
}


def check_shards(adapter: Adapter) -> None:
    """Steps on a sharded cache equal those of one big cache: loss, gradient, rows and ages."""
    if adapter.replicas is None:
        return
    given = adapter.replicas(len(SHARDS), _sharded_runs)
    for number, (options, more) in enumerate(_option_sets()):
        for step, expected in enumerate(_steps(adapter, _Whole(adapter, options, **more))):
            parts = [runs[number][step] for runs in given]
            path = f"{options}, step {step}"
            mean = tuple(np.mean(each, axis=0) for each in zip(*(p[0] for p in parts), strict=True))
            assert_equal(adapter.name, path, mean, expected[0], tolerance=1e-9)
            caches = tuple(part[1] for part in parts)
            assert_equal(adapter.name, path, caches, expected[1], tolerance=1e-9)
            for part in parts:
                assert_equal(adapter.name, f"{path}: window", part[2], expected[2], tolerance=1e-5)
    _assert_unique(adapter, [runs[-1][-1][1] for runs in given])


def _assert_unique(adapter: Adapter, shards: list[Any]) -> None:
    """Raise AssertionError unless each item is in one slot of all shards, in its latest form."""
    expected, found = {}, []
    for step in range(len(SIZES)):
        batch, _ = _batch(step, 1)
        for item, tokens in zip(batch["id"], batch["tokens"], strict=True):
            expected[int(item)] = tokens.tolist()
    for data, age in shards:
        rows = zip(data["id"][age < EMPTY], data["tokens"][age < EMPTY], strict=True)
        found += [(int(item), tokens.tolist()) for item, tokens in rows]
    message = f"{adapter.name}: shards hold {found}, expected once each {expected}"
    assert_true(sorted(found) == sorted(expected.items()), message)


def _option_sets() -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return options of losses and managers: every estimator with all it can have."""
    found: list[dict[str, Any]] = []
    for name, estimator in ESTIMATORS.items():
        found.append(
            {"estimator": name, "num_samples": 2, "in_batch_negatives": True, "id_key": "id"}
        )
        found.append({"estimator": name, "group_key": "id", "margin": 0.1, "max_staleness": 0.2})
        if not estimator.reads_out:
            found.append({"estimator": name, "top_k": 4})
        if estimator.shares_draws:
            found.append({"estimator": name, "num_samples": 2, **MATRYOSHKA})
    coded = {"estimator": "exact_query", "num_samples": 2, "in_batch_negatives": True}
    return [*((each, {}) for each in found), (coded, {"stored": "int8"})]


def _batch(step: int, draws: int) -> tuple[dict[str, Any], tuple[int, ...]]:
    """Return the whole batch of a step, and how many of its rows each replica has."""
    rng, sizes = np.random.default_rng(17 + step), SIZES[step]
    rows = items_of(rng, sum(sizes))
    rows["query"] = rng.standard_normal((sum(sizes), WIDTH))
    rows["noise"] = rng.random((sum(sizes), draws, 2))
    return rows, sizes


def _parts(batch: dict[str, Any], sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    ends = np.cumsum(sizes)
    return [
        {key: rows[end - size : end] for key, rows in batch.items()}
        for end, size in zip(ends, sizes, strict=True)
    ]


def _gradients(side: Adapter, loss_of: Any) -> tuple[Any, ...]:
    """Return the value of loss_of(a matrix on the towers, the scale), and its gradients, if any."""
    now: dict[str, Any] = {}

    def value(matrix: Any, scale: Any) -> Any:
        now["loss"] = loss_of(matrix, scale)
        return now["loss"]

    arrays = [np.linspace(-1.0, 1.0, WIDTH * WIDTH).reshape(WIDTH, WIDTH), np.asarray(1.5)]
    native = [side.to_native(array) for array in arrays]
    gradients = [] if side.gradients is None else side.gradients(value, native)
    if side.gradients is None:
        value(*native)
    return (np.array(side.to_numpy(now["loss"])), *map(np.asarray, gradients))


def _sharded_runs(side: Adapter, rank: int) -> list[list[Tree]]:
    """Return a replica's results after each step of each run: loss, gradients, and its shard."""
    return [
        _steps(side, _Sharded(side, rank, options, **more))
        for options, more in [*_option_sets(), ({}, UNIQUE)]
    ]


def _steps(side: Adapter, run: "_Sharded | _Whole") -> list[Tree]:
    steps: list[Tree] = []
    for step in range(len(SIZES)):
        run.take(*_batch(step, run.loss.num_samples))
        gradients = _gradients(side, run.loss_of)
        window = run.handler._store.read().window  # noqa: SLF001 - no other way to see its sums
        steps.append((gradients, side.numpy(run.cache()), side.numpy(window)))
    return steps


class _Sharded:
    """A handler of one replica's shard."""

    def __init__(self, side: Adapter, rank: int, options: dict[str, Any], **more: Any) -> None:
        module = side.module
        self.side, self.rank, self.scale = side, rank, None
        self.loss = module.DistributedCacheClassificationLoss(
            "embedding", ("tokens",), scale=lambda: self.scale, **options
        )
        self.handler = module.CacheLossHandler(
            manager_of(module, **{"capacity": sum(SHARDS), **more}),
            self.loss,
            embedding_key="embedding",
            data_keys=("tokens",),
        )

    def take(self, batch: dict[str, Any], sizes: tuple[int, ...]) -> None:
        """Take the part of the batch that is this replica's."""
        self.batch = self.side.native(_parts(batch, sizes)[self.rank])

    def loss_of(self, matrix: Any, scale: Any) -> Any:
        """Run a step."""
        self.scale = scale
        query, item_network, features = _towers(self.side, self.batch, matrix)
        return self.handler.update_cache_and_compute_loss(
            item_network, query, item_network(features), features, noise=self.batch["noise"]
        )

    def cache(self) -> Any:
        """Return the shard."""
        return self.handler.cache


class _Whole:
    """A handler of one big cache, whose caches are the shards."""

    def __init__(self, side: Adapter, options: dict[str, Any], **more: Any) -> None:
        module = side.module
        self.side, self.scale = side, None
        self.loss = module.CacheClassificationLoss(
            "embedding", ("tokens",), scale=lambda: self.scale, **options
        )
        self.handler = module.MultiCacheLossHandler(
            {str(rank): manager_of(module, slots, **more) for rank, slots in enumerate(SHARDS)},
            self.loss,
            embedding_key="embedding",
            data_keys=("tokens",),
        )

    def take(self, batch: dict[str, Any], sizes: tuple[int, ...]) -> None:
        """Take all of the batch."""
        self.batch = self.side.native(batch)
        self.parts = [self.side.native(part) for part in _parts(batch, sizes)]

    def loss_of(self, matrix: Any, scale: Any) -> Any:
        """Run a step, and put each replica's rows into the cache that represents its shard."""
        self.scale = scale
        query, item_network, features = _towers(self.side, self.batch, matrix)
        result = self.loss(
            item_network,
            query,
            item_network(features),
            self.handler._store.read(),  # noqa: SLF001 - a window comes with it
            pos_features=features,
            noise=self.batch["noise"],
        )
        towers = [_towers(self.side, part, matrix) for part in self.parts]
        self.handler.commit(
            result,
            {str(rank): network(rows) for rank, (_, network, rows) in enumerate(towers)},
            {str(rank): rows for rank, (_, _, rows) in enumerate(towers)},
        )
        return result.loss

    def cache(self) -> Any:
        """Return the shards."""
        return tuple(self.handler.cache.values())


def _towers(side: Adapter, batch: dict[str, Any], matrix: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Return the queries' embeddings, the item network, and the items' features."""
    matmul = side.module.CacheManager.backend.xp.matmul

    def item_network(features: dict[str, Any]) -> Any:
        return matmul(embed(side, features), matrix)

    return (
        matmul(batch["query"], matrix),
        item_network,
        {key: batch[key] for key in ("tokens", "id")},
    )
