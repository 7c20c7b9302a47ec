"""Saving, loading, resizing: exact, whole or not at all, and never into a cache of another kind."""

import copy

import jax
import ml_dtypes
import negcache_jax
import numpy as np
import pytest
import tensorflow as tf
import torch
from backends import BACKENDS
from hypothesis import given
from hypothesis import strategies as st

import negcache_core
from negcache_core import (
    EMPTY,
    CapacityError,
    CheckpointError,
    DTypeError,
    FieldSpec,
    KeysError,
    KindError,
    NegativeCache,
    NegcacheError,
    NonFiniteWarning,
    OptionError,
    ShapeError,
)
from negcache_core.cache.restoring import resize_cache
from negcache_core.files import replacing, write_arrays

ALL = pytest.mark.parametrize(
    "backend",
    [BACKENDS[name] for name in ("numpy", "torch", "tensorflow", "jax")],
    ids=lambda backend: backend.name,
)
DTYPES = ("bool", "int8", "uint16", "int64", "float16", "bfloat16", "float32", "float64")


class Jax:
    """A JAX handler with its state, so that one test fits all."""

    def __init__(self, handler):
        self.handler, self.state = handler, handler.init(jax.random.key(3))
        self.step = jax.jit(handler.update_cache_and_compute_loss, static_argnums=1)

    def update_cache_and_compute_loss(self, *arguments):
        loss, self.state = self.step(self.state, *arguments)
        return loss

    def __getattr__(self, name):
        def call(*arguments, **options):
            made = getattr(self.handler, name)(self.state, *arguments, **options)
            made = (None, made) if isinstance(made, negcache_jax.HandlerState) else made
            value, self.state = made
            return value

        return call

    @property
    def cache(self):
        return self.handler.bind(self.state).cache

    def save(self, path):
        self.handler.save(self.state, path)


def specs_of(module, *, dtypes=DTYPES, width=2, dtype="float32"):
    named = {"bfloat16": ml_dtypes.bfloat16}  # NumPy does not know it by name
    more = {f"{each} / 100%": module.FieldSpec((2,), named.get(each, each)) for each in dtypes}
    spec = module.FieldSpec((width,), dtype)
    return {"x": spec, "embedding": spec, "age": module.FieldSpec((), "int32"), **more}


def handler_of(backend, capacity=5, *, names=None, seed=1, retrieval_fn=False, **options):
    module = backend.module
    manager = module.CacheManager(specs_of(module, **options), capacity)
    drawing = {} if backend.name == "jax" else {"generator": seed}
    if retrieval_fn:
        drawing = {"retrieval_fn": module.GumbelMaxRetrievalFn(**drawing)}
    loss = module.CacheClassificationLoss("embedding", ("x",), **drawing)
    if names:
        managers = dict.fromkeys(names, manager)
        made = module.MultiCacheLossHandler(managers, loss, "embedding", ("x",))
    else:
        made = module.CacheLossHandler(manager, loss, "embedding", ("x",))
    return Jax(made) if backend.name == "jax" else made


def caches_of(handler):
    cache = handler.cache
    return {"cache": cache} if isinstance(cache, NegativeCache) else cache


def run(backend, handler, seed, *, rows=2, dtypes=DTYPES):
    """Run one step on random rows of all fields; return the loss."""
    rng, xp = np.random.default_rng(seed), backend.module.CacheManager.backend.xp
    query, x = (
        backend.to_native(rng.standard_normal((rows, 2)).astype("float32")) for _ in range(2)
    )
    features = {"x": x, "age": backend.to_native(rng.integers(0, 99, rows).astype("int32"))}
    for each in dtypes:
        numbers = rng.integers(0, 2 if each == "bool" else 99, (rows, 2))
        wide = backend.to_native(numbers.astype("float32" if "float" in each else "int32"))
        features[f"{each} / 100%"] = xp.astype(wide, getattr(xp, each, ml_dtypes.bfloat16))
    new_items = (features,)
    if not isinstance(handler.cache, NegativeCache):
        new_items = ({name: double({"x": x}) for name in handler.cache},)
        new_items += (dict.fromkeys(handler.cache, features),)
    return float(handler.update_cache_and_compute_loss(double, query, double({"x": x}), *new_items))


def double(features):
    return features["x"] * 2.0


def host(handler):
    """Return every bit of a handler's rows and ages, as NumPy arrays."""
    verbs = (handler.handler if isinstance(handler, Jax) else handler).backend
    return {
        name: NegativeCache(
            {key: np.array(verbs.to_host(rows)) for key, rows in cache.data.items()},
            np.array(verbs.to_host(cache.age)),
        )
        for name, cache in caches_of(handler).items()
    }


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, (data, age) in theirs.items():
        assert ours[name].data.keys() == data.keys()
        np.testing.assert_array_equal(ours[name].age, age)
        for key, rows in data.items():
            assert ours[name].data[key].dtype == rows.dtype
            np.testing.assert_array_equal(ours[name].data[key], rows, err_msg=key)


@ALL
@pytest.mark.parametrize("options", [{}, {"names": ("a", "a/data/b %")}, {"retrieval_fn": True}])
def test_a_handler_that_loads_goes_on_bit_for_bit(backend, options, tmp_path):
    """Every dtype, odd names, several caches, every generator."""
    handler = handler_of(backend, **options)
    for seed in range(4):
        run(backend, handler, seed)
    path = tmp_path / "cache.safetensors"
    handler.save(path)
    resumed = handler_of(backend, seed=99, **options)
    resumed.load(str(path))
    assert_same(host(resumed), host(handler))
    for seed in range(4, 8):
        assert run(backend, resumed, seed) == run(backend, handler, seed)
        assert_same(host(resumed), host(handler))
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


@ALL
def test_rows_go_from_library_to_library_and_draws_do_not(backend, tmp_path):
    source = handler_of(BACKENDS["torch"])
    for seed in range(2):
        run(BACKENDS["torch"], source, seed)
    path = tmp_path / "cache"
    source.save(path)
    handler = handler_of(backend)
    if backend.name != "torch":
        before = host(handler)
        with pytest.raises(OptionError, match=r"SplitMix64.*draws=False"):
            handler.load(path)
        assert_same(host(handler), before)
    handler.load(path, draws=False)
    assert_same(host(handler), host(source))
    other = handler_of(backend)
    other.restore(host(source)["cache"])
    assert_same(host(other), host(source))


@given(
    ages=st.lists(st.sampled_from([0, 1, 2, 3, EMPTY]), min_size=1, max_size=7),
    capacity=st.integers(1, 9),
)
def test_resize_drops_what_new_items_would_have_overwritten(ages, capacity):
    slots = len(ages)
    manager = negcache_core.CacheManager({"x": FieldSpec((), "int64")}, slots)
    cache = NegativeCache({"x": np.arange(slots)}, np.asarray(ages, np.int32))
    resized = resize_cache(cache, capacity)
    assert resized.age.shape == resized.data["x"].shape == (capacity,)
    surplus = max(slots - capacity, 0)
    after = manager.update_cache(cache, new_items={"x": np.full(surplus, -1)})
    kept = np.flatnonzero(after.data["x"] >= 0)
    np.testing.assert_array_equal(resized.data["x"][: len(kept)], kept)
    np.testing.assert_array_equal(resized.age[: len(kept)], cache.age[kept])
    assert (resized.age[len(kept) :] == EMPTY).all()
    assert not resized.data["x"][len(kept) :].any()


@ALL
@pytest.mark.parametrize("capacity", [3, 8])
def test_another_capacity_is_refused_unless_it_is_asked_for(backend, capacity, tmp_path):
    handler, other = handler_of(backend), handler_of(backend, capacity)
    for seed in range(4):
        run(backend, handler, seed)
    run(backend, other, 9)
    before, path = host(other), tmp_path / "cache"
    handler.save(path)
    for bring, what in ((other.load, path), (other.restore, handler.cache)):
        with pytest.raises(CapacityError, match=rf"5 slots: expected {capacity}.*resize=True"):
            bring(what)
        assert_same(host(other), before)
    other.load(path, resize=True)
    assert_same(host(other), {"cache": resize_cache(host(handler)["cache"], capacity)})
    assert run(backend, other, 5) > 0


MISFITS = [
    ({"dtype": "float16"}, DTypeError, "dtype float16: expected float32"),
    ({"width": 3}, ShapeError, r"shape \(5, 3\): expected \(5, 2\)"),
    ({"dtypes": ("bool",)}, KeysError, "missing: .*int8"),
    ({"names": ("a", "b")}, KeysError, "missing: .*cache"),
]


@ALL
@pytest.mark.parametrize(("options", "error", "message"), MISFITS)
def test_a_cache_of_another_kind_is_refused(backend, options, error, message, tmp_path):
    other, handler = handler_of(backend, **options), handler_of(backend)
    run(backend, handler, 0)
    before, path = host(handler), tmp_path / "cache"
    other.save(path)
    for bring, what in ((handler.load, path), (handler.restore, other.cache)):
        for resize in (False, True):
            with pytest.raises(error, match=message):
                bring(what, resize=resize)
            assert_same(host(handler), before)


def test_what_is_no_cache_is_refused(tmp_path):
    handler = handler_of(BACKENDS["numpy"], dtypes=())
    data = dict(handler.cache.data)
    for bad, error in (
        (None, KindError),
        (NegativeCache(data, np.full(5, -1, np.int32)), OptionError),
        (NegativeCache(data, np.full(5, 2**31)), DTypeError),
        (NegativeCache(data, np.full(5, 1.0)), DTypeError),
        (NegativeCache({**data, "x": np.zeros((4, 2), np.float32)}, handler.cache.age), ShapeError),
    ):
        with pytest.raises(error):
            handler.restore(bad)
    for path in (None, 3, b"cache"):
        with pytest.raises(KindError, match="pathlib"):
            handler.save(path)
        with pytest.raises(KindError, match="pathlib"):
            handler.load(path)
    with pytest.raises(FileNotFoundError):
        handler.load(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError):
        handler.save(tmp_path / "nowhere" / "cache")


def test_a_damaged_file_is_refused_and_the_live_cache_stays(tmp_path):
    """Cut at every length, and every byte changed: an error of ours, or nothing that counts."""
    backend = BACKENDS["numpy"]
    saved, handler = (handler_of(backend, 2, dtypes=("bfloat16",)) for _ in range(2))
    run(backend, saved, 0, dtypes=("bfloat16",))
    run(backend, handler, 1, dtypes=("bfloat16",))
    path, damaged = tmp_path / "cache", tmp_path / "damaged"
    saved.save(path)
    whole, before = path.read_bytes(), host(handler)
    draws = handler.cache_loss.generator.bit_generator.state
    for length in range(len(whole)):
        damaged.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="damaged"):
            handler.load(damaged)
    harmless = 0
    for place in range(len(whole)):
        damaged.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        twin = copy.deepcopy(handler)
        try:
            twin.load(damaged)
        except CheckpointError:
            assert_same(host(twin), before)
            assert twin.cache_loss.generator.bit_generator.state == draws
        else:
            harmless += 1
            assert_same(host(twin), host(saved))
    assert harmless < 8  # a name in the header that nothing is read by
    assert_same(host(handler), before)


def test_a_file_of_another_kind_is_refused(tmp_path):
    from safetensors.numpy import save_file  # noqa: PLC0415 - what a user's own file is made by

    handler = handler_of(BACKENDS["numpy"])
    save_file({"x": np.zeros(3)}, tmp_path / "other")
    with pytest.raises(CheckpointError, match="format None"):
        handler.load(tmp_path / "other")
    write_arrays(tmp_path / "odd", {"cache/age": np.zeros(5, np.int32)}, [])
    with pytest.raises(NegcacheError):
        handler.load(tmp_path / "odd", draws=False)


def test_an_error_while_saving_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail():
        with replacing(path) as partial:
            partial.write_text("half of the ne")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    handler_of(BACKENDS["numpy"]).save(path)
    ordinary = tmp_path / "ordinary"
    ordinary.touch()
    assert path.stat().st_mode == ordinary.stat().st_mode


def poisoned(backend):
    """Return a handler whose slots 0 and 2 of 5 hold a NaN and an infinity, as of elsewhere."""
    handler = handler_of(backend, dtypes=())
    for seed in range(2):
        run(backend, handler, seed, dtypes=())
    data, age = handler.cache
    rows = np.array(backend.to_numpy(data["embedding"]))
    rows[[0, 2], [1, 0]] = np.nan, np.inf
    rows[4] = np.nan  # a slot that was never written
    handler_backend = (handler.handler if isinstance(handler, Jax) else handler).backend
    table = handler_backend.overwrite(data["embedding"], backend.to_native(rows))
    if isinstance(handler, Jax):
        cache = NegativeCache({**data, "embedding": table}, age)
        handler.state = handler.state._replace(caches={"cache": cache})
    return handler


@ALL
@pytest.mark.parametrize("bring", ["load", "restore", "evict_nonfinite"])
def test_rows_that_are_not_finite_are_reported_and_stay_behind(backend, bring, tmp_path):
    bad, handler, path = poisoned(backend), handler_of(backend, dtypes=()), tmp_path / "cache"
    if bring == "evict_nonfinite":
        handler = bad
        for count in (2, 0):
            found = handler.evict_nonfinite()
            assert found is None if backend.name == "jax" else int(found) == count
    else:
        bad.save(path)
        with pytest.warns(NonFiniteWarning, match="2 rows"):
            getattr(handler, bring)(path if bring == "load" else bad.cache)
    empty = host(handler)["cache"].age == EMPTY
    np.testing.assert_array_equal(empty, [True, False, True, False, True])
    assert np.isfinite(run(backend, handler, 7, dtypes=()))


def test_a_state_dict_that_does_not_fit_changes_nothing():
    """In a bigger module, strict or not; PyTorch would cast, and copy what fits."""

    def model_of(**options):
        handler = handler_of(BACKENDS["torch"], dtypes=(), **options)
        run(BACKENDS["torch"], handler, options.get("seed", 1), dtypes=())
        return torch.nn.ModuleDict({"tower": torch.nn.Linear(2, 2), "handler": handler})

    model = model_of()
    before = {key: value.clone() for key, value in model["handler"].state_dict().items()}

    def refused(state, error, message, *, strict):
        with pytest.raises(error, match=message):
            model.load_state_dict(state, strict=strict)
        for key, value in before.items():
            assert torch.equal(model["handler"].state_dict()[key], value), key

    model.load_state_dict({"tower.weight": torch.zeros(2, 2)}, strict=False)  # not the handler's
    for strict in (False, True):
        for options, error in (
            ({"capacity": 4}, CapacityError),
            ({"dtype": "float64"}, DTypeError),
            ({"width": 3}, ShapeError),
        ):
            made = handler_of(BACKENDS["torch"], **{"dtypes": (), **options})
            other = torch.nn.ModuleDict({"handler": made})
            state = {**model.state_dict(), **other.state_dict()}
            refused(state, error, "to load has", strict=strict)
        for gone in ("tables.cache_cache.age", "tables.cache_cache.field_x", "generator.state"):
            state = {k: v for k, v in model.state_dict().items() if not k.endswith(gone)}
            refused(state, KeysError, "lacks.*" + gone, strict=strict)
        state = {**model.state_dict(), "handler.y": torch.zeros(1)}
        refused(state, KeysError, r"unknown \['handler.y'\]", strict=strict)
    other = model_of(seed=5)
    model.load_state_dict(other.state_dict())
    assert_same(host(model["handler"]), host(other["handler"]))


def test_a_state_dict_with_rows_that_are_not_finite():
    state = poisoned(BACKENDS["torch"]).state_dict()
    age = state["tables.cache_cache.age"].clone()
    for assign in (False, True):
        handler = handler_of(BACKENDS["torch"], dtypes=())
        with pytest.warns(NonFiniteWarning, match="2 rows"):
            handler.load_state_dict(state, assign=assign)
        assert (handler.cache.age == EMPTY).tolist() == [True, False, True, False, True]
    assert torch.equal(state["tables.cache_cache.age"], age)  # the file's own stays as it is


def test_a_tensorflow_checkpoint_that_does_not_fit_changes_nothing(tmp_path):
    """TensorFlow would assign what fits, and pass over fields that it does not know."""
    backend = BACKENDS["tensorflow"]
    handler = handler_of(backend, dtypes=())
    run(backend, handler, 0, dtypes=())
    before, draws = host(handler), handler.cache_loss.generator.state.numpy()
    for index, (options, error, _) in enumerate(
        [*MISFITS[:2], ({"dtypes": ("bool",)}, KeysError, ""), ({"capacity": 4}, CapacityError, "")]
    ):
        other = handler_of(backend, **{"dtypes": (), **options})
        path = tf.train.Checkpoint(handler=other).save(str(tmp_path / str(index)))
        with pytest.raises(error):
            tf.train.Checkpoint(handler=handler).restore(path)
        assert_same(host(handler), before)
        np.testing.assert_array_equal(handler.cache_loss.generator.state.numpy(), draws)


@pytest.mark.parametrize("traced", [False, True])
def test_a_tensorflow_checkpoint_with_rows_that_are_not_finite(traced, tmp_path):
    """Seen when the cache is first used; also while a step is being traced."""
    backend = BACKENDS["tensorflow"]
    path = tf.train.Checkpoint(handler=poisoned(backend)).save(str(tmp_path / "checkpoint"))
    handler = handler_of(backend, dtypes=())
    tf.train.Checkpoint(handler=handler).restore(path).assert_consumed()
    x, ids = tf.ones((2, 2)), tf.zeros((2,), tf.int32)

    def step():
        features = {"x": x, "age": ids}
        return handler.update_cache_and_compute_loss(lambda data: data["x"], x, x, features)

    step = tf.function(step, autograph=False) if traced else step
    with pytest.warns(NonFiniteWarning, match="2 rows"):
        loss = step()
    assert np.isfinite(loss.numpy())
    written = host(handler)["cache"].age != EMPTY
    assert written.tolist() == [True, True, True, True, False]  # two new items over the two
    assert np.isfinite(step().numpy())


def test_a_jax_state_that_does_not_fit_is_refused():
    """Also while it is traced: by shapes and dtypes alone."""
    handler = handler_of(BACKENDS["jax"], dtypes=()).handler
    for options, error in (
        ({"capacity": 4}, CapacityError),
        ({"dtype": "float16"}, DTypeError),
        ({"width": 3}, ShapeError),
        ({"dtypes": ("bool",)}, KeysError),
    ):
        state = handler_of(BACKENDS["jax"], **{"dtypes": (), **options}).state
        for use in (handler.bind, jax.jit(handler.evict_nonfinite)):
            with pytest.raises(error, match="cache"):
                use(state)
    with pytest.raises(KindError, match="HandlerState"):
        handler.bind(state._asdict())


def test_a_cache_in_shards_is_saved_by_its_framework(tmp_path):
    specs = {key: FieldSpec((2,), "float32") for key in ("x", "embedding")}
    handler = negcache_jax.CacheLossHandler(
        negcache_jax.CacheManager(specs, 4),
        negcache_jax.DistributedCacheClassificationLoss("embedding", ("x",), group="data"),
        "embedding",
        ("x",),
        group="data",
    )
    state = handler.init(jax.random.key(0))
    for call in (
        lambda: handler.save(state, tmp_path / "cache"),
        lambda: handler.load(state, tmp_path / "cache"),
        lambda: handler.restore(state, state.caches),
    ):
        with pytest.raises(OptionError, match=r"docs/scaling\.md"):
            call()
