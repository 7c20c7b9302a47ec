"""What counts up without end: ages stop one below EMPTY, and all goes on from there."""

import numpy as np
import pytest
from backends import BACKENDS, EAGER

from negcache_core import EMPTY
from negcache_core.cache.plans import oldest_written, plan_insert
from negcache_core.cache.state import OLDEST, NegativeCache
from negcache_core.testing import DictCache

NEAR = 2**31 - 5
ALL = pytest.mark.parametrize(
    "backend", [*EAGER.values(), BACKENDS["jax.jit"]], ids=lambda backend: backend.name
)


def cache_of(age):
    age = np.asarray(age, np.int32)
    rows = np.arange(1.0, len(age) + 1, dtype=np.float32)[:, None] * (age != EMPTY)[:, None]
    return NegativeCache({"x": rows, "id": np.arange(len(age)), "embedding": 2 * rows}, age)


@ALL
@pytest.mark.parametrize("unique_key", [None, "id"])
def test_rows_at_the_ceiling_tie_and_leave_from_the_lowest_slot(backend, unique_key):
    module, age = backend.module, [NEAR, NEAR + 1, EMPTY, NEAR - 1, 7]
    manager = module.CacheManager(
        {
            "x": module.FieldSpec((1,), "float32"),
            "id": module.FieldSpec((), "int64"),
            "embedding": module.FieldSpec((1,), "float32"),
        },
        len(age),
        unique_key=unique_key,
    )

    def script(cache, batch):
        ages = []
        for _ in range(5):
            cache = manager.update_cache(cache)
            ages.append(cache.age)
        oldest = oldest_written(cache.age, 5, xp=manager.backend.xp)
        return tuple(ages), oldest, manager.update_cache(cache, new_items=batch)

    ids = np.asarray([20, 21, 22])
    rows = {"x": np.ones((3, 1), np.float32), "id": ids, "embedding": np.ones((3, 1), np.float32)}
    ages, (slots, live), cache = backend.replay(script, cache_of(age), rows)

    model = DictCache(len(age), {"id": -1}, unique_key=unique_key)
    model.age = {slot: each for slot, each in enumerate(age) if each != EMPTY}
    for each in ages:
        model.update()
        np.testing.assert_array_equal(each, model.ages())
    np.testing.assert_array_equal(ages[-1], [OLDEST, OLDEST, EMPTY, OLDEST, 12])
    np.testing.assert_array_equal(slots, [0, 1, 3, 4, 0])
    np.testing.assert_array_equal(live, [True] * 4 + [False])
    # The empty slot, then the lowest of those that tie, though slot 1 held the oldest row.
    model.update(new_items=[({"id": each}, True) for each in ids])
    np.testing.assert_array_equal(cache.age, model.ages())
    np.testing.assert_array_equal(cache.age, [0, 0, 0, OLDEST, 13])
    np.testing.assert_array_equal(cache.data["id"], [21, 22, 20, 3, 4])


@ALL
def test_ages_one_apart_near_the_ceiling_keep_their_order(backend):
    """A float32 key, or one that overflows, would not tell them apart."""
    age = np.full(1_100, OLDEST - 1, np.int32)
    age[[5, 900]] = OLDEST
    xp = backend.module.CacheManager.backend.xp
    slots = backend.replay(lambda age, batch: plan_insert(age, 3, xp=xp).slots, age, {})
    np.testing.assert_array_equal(slots, [5, 900, 0])


@ALL
def test_draws_and_metrics_at_the_ceiling(backend):
    loss = backend.module.CacheClassificationLoss("embedding", ("x",))

    def script(cache, batch):
        drawn = loss.retrieve(batch["query"], cache, noise=batch["noise"])
        query, fresh = batch["query"], drawn.features["x"]
        return drawn.ages, drawn.fill, loss.loss_from_negatives(query, query, fresh, drawn).metrics

    query, noise = np.ones((3, 1), np.float32), np.linspace(0, 0.99, 6).reshape(3, 1, 2)
    cache = cache_of([OLDEST, EMPTY, OLDEST, OLDEST])
    ages, fill, metrics = backend.replay(script, cache, {"query": query, "noise": noise})
    np.testing.assert_array_equal(ages, [OLDEST] * 3)
    assert fill == 0.75
    assert np.isfinite([float(value) for value in metrics.values()]).all()
    assert metrics["mean_age_drawn"] == np.float32(OLDEST)
