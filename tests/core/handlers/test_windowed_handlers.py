"""A handler keeps the window of ages: in its files, its checkpoints, its state."""

import jax
import negcache_torch
import numpy as np
import pytest
import torch
from handled import HANDLED, batch_of, double, handler_of

from negcache_core import EMPTY, KeysError, NegativeCache, OptionError
from negcache_core.cache.window import START

LIMIT = 0.2


def windowed(backend, seed=1, **options):
    loss = backend.module.CacheClassificationLoss(
        "embedding", ("x",), generator=seed, max_staleness=LIMIT
    )
    return handler_of(backend, loss=loss, capacity=12, **options)


def run(backend, handler, seed, factor=1.0):
    query, x = batch_of(backend, seed, rows=3)

    def network(features):
        return double(features) * factor

    loss = handler.update_cache_and_compute_loss(network, query, network({"x": x}), {"x": x})
    return float(loss)


def window_of(backend, handler):
    return np.array(backend.to_numpy(handler._store.read().window))


@HANDLED
def test_a_step_shows_it_and_moves_it(backend):
    handler = windowed(backend)
    seen = []
    for seed in range(6):
        run(backend, handler, seed, 1.0 + 0.1 * seed)
        seen.append(float(handler.metrics["window"]))
    assert seen[:2] == [START, START]  # of an empty cache nothing was drawn
    assert len(set(seen[2:])) == 4
    assert ", window " in repr(handler)
    assert f"max_staleness {LIMIT}" in repr(handler)
    before = window_of(backend, handler)
    query, x = batch_of(backend, 9)
    handler.update_cache_and_compute_loss(double, query, double({"x": x}), {"x": x}, training=False)
    np.testing.assert_array_equal(window_of(backend, handler), before)


@HANDLED
def test_a_file_holds_it_and_a_reset_forgets_it(backend, tmp_path):
    handler = windowed(backend)
    for seed in range(6):
        run(backend, handler, seed, 1.0 + 0.1 * seed)
    path = tmp_path / "cache"
    handler.save(path)
    resumed = windowed(backend, seed=5)
    resumed.load(path)
    np.testing.assert_array_equal(window_of(backend, resumed), window_of(backend, handler))
    for seed in range(6, 9):
        assert run(backend, resumed, seed, 1.5) == run(backend, handler, seed, 1.5)
        np.testing.assert_array_equal(window_of(backend, resumed), window_of(backend, handler))
    handler.reset()
    np.testing.assert_array_equal(window_of(backend, handler), [START, 0, 0, 0, 0, 0])


@HANDLED
def test_files_with_and_without_it_fit_handlers_with_and_without(backend, tmp_path):
    with_it, without = windowed(backend), handler_of(backend, capacity=12)
    for handler in (with_it, without):
        for seed in range(4):
            run(backend, handler, seed)
    with_it.save(tmp_path / "with")
    without.save(tmp_path / "without")
    without.load(tmp_path / "with")
    fresh = windowed(backend)
    fresh.load(tmp_path / "without")
    assert window_of(backend, fresh)[0] == START  # no row is older
    run(backend, fresh, 4)
    data, age = backend.numpy(without.cache)
    older = np.where(age < EMPTY, age + 90, EMPTY).astype(np.int32)
    fresh.restore(NegativeCache(data, older))
    oldest = older[older < EMPTY].max()
    np.testing.assert_array_equal(window_of(backend, fresh), [oldest, 0, 0, 0, 0, 0])


@HANDLED
def test_a_step_that_fails_leaves_it(backend):
    handler = windowed(backend)
    for seed in range(4):
        run(backend, handler, seed, 1.0 + 0.1 * seed)
    before = window_of(backend, handler)

    def failing(cache, new_items):
        raise RuntimeError("a filter's")

    handler.new_items_filter = failing
    with pytest.raises(RuntimeError, match="a filter's"):
        run(backend, handler, 5)
    np.testing.assert_array_equal(window_of(backend, handler), before)


@HANDLED
def test_without_a_handler_nobody_keeps_it(backend):
    handler = windowed(backend)
    query, x = batch_of(backend, 0)
    with pytest.raises(OptionError, match="call the loss through a CacheLossHandler"):
        handler.cache_loss(double, query, double({"x": x}), handler.cache)
    run(backend, handler, 0)
    result = handler.cache_loss.evaluate(double, query, double({"x": x}), handler.cache)
    assert float(result.loss) > 0  # evaluated, it is against the whole cache


@pytest.mark.parametrize("limit", [0, -0.1, float("nan"), float("inf")])
def test_a_limit_that_lets_nothing_compete_is_refused(limit):
    with pytest.raises(OptionError, match="max_staleness"):
        negcache_torch.CacheClassificationLoss("embedding", ("x",), max_staleness=limit)


def torch_loss(**options):
    return negcache_torch.NegativeCacheLoss(8, {"x": torch.zeros(1, 2)}, 2, generator=0, **options)


def test_a_state_dict_from_before_max_staleness_is_taken():
    old, new = torch_loss(max_staleness=None), torch_loss()
    x = torch.eye(2)
    for loss_fn in (old, new):
        for _ in range(5):
            loss_fn(double, x, double({"x": x}), {"x": x}, training=True)
    state = old.state_dict()
    age = state["tables.cache_cache.age"]
    age[age < EMPTY] += 40
    new.load_state_dict(state)
    assert new._store.read().window.tolist() == [age[age < EMPTY].max(), 0, 0, 0, 0, 0]
    torch.testing.assert_close(new.cache.age, old.cache.age, rtol=0, atol=0)
    with pytest.raises(KeysError, match=r"tables\.window"):
        old.load_state_dict(new.state_dict())


def test_the_window_of_a_state_dict_is_loaded_and_follows_no_cast():
    one, other = torch_loss(max_staleness=LIMIT), torch_loss(max_staleness=LIMIT)
    x = torch.eye(2)
    for factor in range(1, 7):

        def network(features, factor=factor):
            return features["x"] * factor

        one(network, x, network({"x": x}), {"x": x}, training=True)
    other.load_state_dict(one.state_dict())
    window = one._store.read().window
    assert window[0] != START
    torch.testing.assert_close(other._store.read().window, window, rtol=0, atol=0)
    other.half()
    assert other._store.read().window.dtype == torch.float32
    meta = torch_loss(max_staleness=LIMIT).to("meta").to_empty(device="cpu")
    assert meta._store.read().window.tolist() == [START, 0, 0, 0, 0, 0]


def test_a_state_of_jax_has_it_where_the_loss_wants_it():
    import negcache_jax as negcache  # noqa: PLC0415 - beside the other adapter's alike

    example = {"x": jax.numpy.zeros((1, 2))}
    without = negcache.NegativeCacheLoss(8, example, 2, max_staleness=None)
    with_it = negcache.NegativeCacheLoss(8, example, 2, max_staleness=LIMIT)
    key = jax.random.key(0)
    assert without.init(key).window is None
    for handler, state in ((with_it, without.init(key)), (without, with_it.init(key))):
        with pytest.raises(OptionError, match=r"state\.window"):
            handler.bind(state)
    moved = with_it.restore(with_it.init(key), without.init(key).caches["cache"])
    assert float(moved.window[0]) == START
