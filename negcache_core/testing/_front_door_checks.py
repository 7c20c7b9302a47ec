"""Checks of NegativeCacheLoss, and of the difference between training and evaluation."""

from typing import Any

import numpy as np

from negcache_core.testing._adapter import Adapter
from negcache_core.testing._scripts import (
    SLOTS,
    WIDTH,
    assert_equal,
    assert_true,
    embed,
    half_full,
    items_of,
)

ROWS = 3
OPTIONS: dict[str, Any] = {"scale": 2.0, "num_samples": 2, "in_batch_negatives": True}


def _batch(adapter: Adapter, seed: int) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    return adapter.native((0.3 * rng.standard_normal((ROWS, WIDTH)), items_of(rng, ROWS)))


def _held(adapter: Adapter, handler: Any) -> Any:
    return handler if adapter.hold is None else adapter.hold(handler, 3)


def _seeded(adapter: Adapter) -> dict[str, Any]:
    return {} if adapter.hold is not None else {"generator": 3}


def check_front_door(adapter: Adapter) -> None:
    """NegativeCacheLoss is the handler that the published constructors make, bit for bit."""
    module = adapter.module
    _, items = _batch(adapter, 0)
    specs = {
        "tokens": module.FieldSpec(items["tokens"].shape[1:], items["tokens"].dtype),
        "id": module.FieldSpec((), items["id"].dtype),
        "embedding": module.FieldSpec((WIDTH,), items["embedding"].dtype),
    }
    by_hand = module.CacheLossHandler(
        module.CacheManager(specs, SLOTS),
        module.CacheClassificationLoss(
            "embedding",
            ("tokens",),
            estimator="exact_query",
            max_staleness=0.2,
            **OPTIONS,
            **_seeded(adapter),
        ),
    )
    tokens, ids = {"tokens": items["tokens"]}, {"id": items["id"]}
    front_door = module.NegativeCacheLoss(
        SLOTS, tokens, items["embedding"], labels=ids, **OPTIONS, **_seeded(adapter)
    )
    assert_true(isinstance(front_door, module.CacheLossHandler), "a NegativeCacheLoss is a handler")
    one, other = _held(adapter, front_door), _held(adapter, by_hand)
    for step in range(4):
        query, items = _batch(adapter, step)
        tokens, ids = {"tokens": items["tokens"]}, {"id": items["id"]}
        arguments = (lambda features: embed(adapter, features), query, items["embedding"])
        given = one(*arguments, tokens, labels=ids)
        expected = other.update_cache_and_compute_loss(*arguments, {**tokens, **ids})
        path = f"the front door's step {step}"
        both = adapter.numpy((given, one.cache)), adapter.numpy((expected, other.cache))
        assert_equal(adapter.name, path, *both, tolerance=0)


def check_evaluation(adapter: Adapter) -> None:
    """Evaluation keeps rows, ages and later draws; its loss is against the current cache.

    The value does not depend on draws: a training step from the same cache gives the same one.
    """
    query, items = _batch(adapter, 7)
    cache = half_full(8)
    cache.data["embedding"] = cache.data["embedding"].astype(np.float32)
    handler, untouched = (_held(adapter, _front_door(adapter, items)) for _ in range(2))
    for each in (handler, untouched):
        each.restore(cache)
    before = adapter.numpy(handler.cache)
    embedding = items["embedding"]
    arguments = (lambda features: embed(adapter, features), query, embedding, items)
    given = adapter.numpy(handler(*arguments, training=False))
    assert_equal(
        adapter.name,
        "the cache after evaluation",
        adapter.numpy(handler.cache),
        before,
        tolerance=0,
    )
    expected = untouched.evaluate(*arguments)
    assert_equal(
        adapter.name, "the loss in evaluation", given, adapter.numpy(expected.loss), tolerance=0
    )
    steps = [adapter.numpy(each(*arguments)) for each in (handler, untouched)]
    assert_equal(adapter.name, "the next step's loss", *steps, tolerance=0)
    caches = [adapter.numpy(each.cache) for each in (handler, untouched)]
    assert_equal(adapter.name, "the next step's cache", *caches, tolerance=0)
    assert_equal(adapter.name, "a step's loss", steps[0], given, tolerance=1e-6)


def _front_door(adapter: Adapter, items: Any) -> Any:
    return adapter.module.NegativeCacheLoss(
        SLOTS, {"tokens": items["tokens"], "id": items["id"]}, WIDTH, **_seeded(adapter)
    )
