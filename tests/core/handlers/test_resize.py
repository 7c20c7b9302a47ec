"""Another number of slots for a live handler: it keeps what `restore(…, resize=True)` keeps."""

import copy

import jax
import negcache_jax
import numpy as np
import pytest
import torch
from backends import BACKENDS
from handled import assert_same_state, batch_of, double, handler_of, multi_of, state_of

from negcache_core import EMPTY, CapacityError, KeysError, KindError, NegativeCache, OptionError
from negcache_core.cache.restoring import resize_cache

HELD = pytest.mark.parametrize("name", ["numpy", "torch"])
MORE = {"flag": "bool", "half": "float16", "big": "uint16"}


def made(backend, capacity=5):
    module = backend.module
    more = {key: module.FieldSpec((), dtype) for key, dtype in MORE.items()}
    return handler_of(backend, capacity=capacity, more=more)


def step(backend, handler, seed):
    query, x = batch_of(backend, seed)
    rng = np.random.default_rng(seed)
    features = {"x": x} | {
        key: backend.to_native(rng.integers(0, 2, 2).astype(dtype)) for key, dtype in MORE.items()
    }
    loss = handler.update_cache_and_compute_loss(double, query, double({"x": x}), features)
    return backend.to_numpy(loss)


@HELD
@pytest.mark.parametrize("written", [1, 2, 4])
@pytest.mark.parametrize("capacity", [1, 3, 5, 8])
def test_it_keeps_the_rows_that_a_restore_keeps_and_goes_on_drawing(name, capacity, written):
    backend = BACKENDS[name]
    handler, twin = made(backend), made(backend, capacity)
    for seed in range(written):
        step(backend, handler, seed)
    before = backend.numpy(handler.cache)
    twin.restore(handler.cache, resize=True)
    draws = type(handler).backend
    _, state = draws.generator_state(handler.cache_loss.generator)
    draws.set_generator_state(twin.cache_loss.generator, state)
    handler.resize(capacity)
    assert handler.cache_manager.cache_size == capacity
    expected = resize_cache(NegativeCache(dict(before.data), before.age), capacity)
    assert_same_state(state_of(backend, handler), {**expected.data, "age": expected.age})
    for seed in range(5, 8) if capacity > 1 else ():
        np.testing.assert_array_equal(step(backend, handler, seed), step(backend, twin, seed))
        assert_same_state(state_of(backend, handler), state_of(backend, twin))


def test_jax_returns_the_state_and_compiles_for_the_new_size():
    backend = BACKENDS["jax"]
    handler = handler_of(
        backend, loss=negcache_jax.CacheClassificationLoss("embedding", ("x",)), capacity=5
    )
    run = jax.jit(handler.update_cache_and_compute_loss, static_argnums=1)
    query, x = batch_of(backend, 0)
    state = handler.init(jax.random.key(0))
    _, state = run(state, double, query, double({"x": x}), {"x": x})
    resized = handler.resize(state, 3)
    before = backend.numpy(state.caches["cache"])
    expected = resize_cache(NegativeCache(dict(before.data), before.age), 3)
    found = backend.numpy(resized.caches["cache"])
    np.testing.assert_array_equal(found.age, expected.age)
    np.testing.assert_array_equal(found.data["x"], expected.data["x"])
    assert resized.key is state.key
    assert handler.cache_manager.cache_size == 3
    _, after = run(resized, double, query, double({"x": x}), {"x": x})
    assert after.caches["cache"].age.shape == (3,)
    with pytest.raises(CapacityError, match="5 slots: expected 3"):  # a state of the former size
        handler.refresh(state, double, 1)
    with pytest.raises(OptionError, match="must run eagerly"):
        jax.jit(lambda state: handler.resize(state, 4))(resized)
    assert handler.cache_manager.cache_size == 3


@HELD
def test_several_caches_by_name(name):
    backend = BACKENDS[name]
    handler = multi_of(backend)
    before = {key: backend.numpy(cache) for key, cache in handler.cache.items()}
    handler.resize({"a": 5})
    sizes = {key: len(backend.to_numpy(cache.age)) for key, cache in handler.cache.items()}
    assert sizes == {"a": 5, "b": 2}
    np.testing.assert_array_equal(backend.to_numpy(handler.cache["b"].age), before["b"].age)
    handler.resize(4)
    assert all(len(backend.to_numpy(cache.age)) == 4 for cache in handler.cache.values())
    query, x = batch_of(backend, 0)
    new = dict.fromkeys("ab", double({"x": x}))
    handler.update_cache_and_compute_loss(
        double, query, double({"x": x}), new, {key: {"x": x} for key in "ab"}
    )


@HELD
def test_what_cannot_be_leaves_all_as_it_was(name):
    backend = BACKENDS[name]
    loss = backend.module.CacheClassificationLoss("embedding", ("x",), top_k=3, generator=0)
    handler = handler_of(backend, loss=loss)
    before = state_of(backend, handler)
    for size, error in (
        (0, CapacityError),
        (2, CapacityError),  # fewer slots than top_k has groups
        (2.5, KindError),
        (True, KindError),
        (2**62, CapacityError),
        ({"other": 3}, KeysError),
    ):
        with pytest.raises(error):
            handler.resize(size)
        assert_same_state(state_of(backend, handler), before)
        assert handler.cache_manager.cache_size == 4


def test_a_manager_that_is_shared_keeps_its_size():
    module = BACKENDS["numpy"].module
    one = handler_of(BACKENDS["numpy"])
    other = module.CacheLossHandler(one.cache_manager, one.cache_loss)
    one.resize(7)
    assert (one.cache_manager.cache_size, other.cache_manager.cache_size) == (7, 4)


def test_tensorflow_names_the_way_out():
    backend = BACKENDS["tensorflow"]
    handler, other = handler_of(backend), handler_of(backend, capacity=6)
    with pytest.raises(OptionError, match=r"new\.restore\(handler\.cache, resize=True\)"):
        handler.resize(6)
    assert handler.cache_manager.cache_size == 4
    other.restore(handler.cache, resize=True)
    assert other.cache.age.shape == (6,)


def test_shards_are_refused():
    loss = negcache_jax.DistributedCacheClassificationLoss("embedding", ("x",))
    handler = handler_of(BACKENDS["jax"], loss=loss)
    with pytest.raises(OptionError, match="resize is for a whole cache"):
        handler.resize(handler.init(jax.random.key(0)), 8)


def test_buffers_of_pytorch_have_the_new_size_and_everything_else_is_as_it_was():
    backend = BACKENDS["torch"]
    handler = handler_of(backend)
    names, copied = list(handler.state_dict()), copy.deepcopy(handler)
    handler.resize(9)
    state = handler.state_dict()
    assert list(state) == names
    assert state["tables.cache_cache.age"].shape == (9,)
    assert (state["tables.cache_cache.age"] == EMPTY).all()
    assert state["tables.cache_cache.field_x"].dtype is torch.float64
    assert len(copied.cache.age) == 4
    other = handler_of(backend, capacity=9)
    other.load_state_dict(state)
