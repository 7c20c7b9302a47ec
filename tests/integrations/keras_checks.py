"""The Keras layer on the backend that KERAS_BACKEND names; test_keras.py runs this once for each.

Fields are of dtypes that HDF5, or Keras's own variables, do not hold on every backend.
"""

import functools
import importlib
import sys
from types import SimpleNamespace

import keras
import negcache_keras
import numpy as np
import pytest
from negcache_keras import CacheLayer, NegativeCacheLoss, layer

import negcache_core
from negcache_core import files

BACKEND = keras.config.backend()
OTHERS = sorted(name for name in ("tensorflow", "jax", "torch") if name != BACKEND)
LOADED = [name for name in OTHERS if f"negcache_{name}" in sys.modules]
# Of Keras's own code, which turns a variable into a NumPy array.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
negcache = importlib.import_module(f"negcache_{BACKEND}")
framework = importlib.import_module(BACKEND)
WIDTH = 4
ROWS = 24 if BACKEND == "jax" else 20  # batches of 8, the last of 4; in JAX of one size, so quick
LONG = "uint32" if BACKEND == "jax" else "uint64"  # JAX has 64 bits where they are asked for
SHOWN = ["cache_effective_negatives", "cache_fill", "cache_staleness", "loss"]
ON_JAX = pytest.mark.skipif(BACKEND != "jax", reason="of JAX")
ON_TENSORFLOW = pytest.mark.skipif(BACKEND != "tensorflow", reason="of TensorFlow")
ON_TORCH = pytest.mark.skipif(BACKEND != "torch", reason="of PyTorch")


def cast(array, dtype):
    array = keras.ops.convert_to_tensor(array)  # train_on_batch gives arrays of NumPy in PyTorch
    if BACKEND == "tensorflow":
        return framework.cast(array, dtype)
    return array.to(getattr(framework, dtype)) if BACKEND == "torch" else array.astype(dtype)


def loss_of(capacity, seed=0, stored="bfloat16", **options):
    return NegativeCacheLoss(
        capacity,
        {"x": negcache.FieldSpec((3,), "bfloat16")},
        negcache.FieldSpec((WIDTH,), stored),
        scale=3.0,
        labels={
            "id": negcache.FieldSpec((), LONG),
            "small": negcache.FieldSpec((), "uint16"),
            "seen": negcache.FieldSpec((), "bool"),
        },
        generator=seed,
        **options,
    )


@keras.saving.register_keras_serializable("keras_checks")
class TwoTower(keras.Model):
    def __init__(self, capacity=16, seed=0, *, cached=True, greedy=False, shown=layer.SHOWN, **options):
        super().__init__(**options)
        keras.utils.set_random_seed(seed)
        self.query_tower, self.item_tower = keras.layers.Dense(WIDTH), keras.layers.Dense(WIDTH)
        drawn = {}
        if greedy:
            drawn = {"retrieval_fn": negcache.MaxScoreRetrievalFn(), "stored": "float32"}
        self.cache = CacheLayer(loss_of(capacity, seed, **drawn), shown) if cached else None

    def call(self, x):
        return self.query_tower(x["query"]), self.item_tower(x["item"])

    def compute_loss(self, x, y, y_pred, sample_weight=None, training=True):
        labels = {"id": cast(x["id"], LONG), "small": cast(x["id"], "uint16")}
        return self.cache.compute_loss(
            lambda rows: self.item_tower(cast(rows["x"], "float32")),
            *y_pred,
            {"x": cast(x["item"], "bfloat16")},
            labels={**labels, "seen": x["id"] > 0},
            training=training,
        )


def data_of(seed=1, rows=ROWS):
    query, item = np.random.default_rng(seed).standard_normal((2, rows, 3)).astype("float32")
    return {"query": query, "item": item, "id": np.arange(rows, dtype="int32") - 5}


# What is quick to start: a graph of TensorFlow's is not, nor is JAX without one.
QUICK = {"run_eagerly": BACKEND != "jax"}


def model_of(*arguments, way=QUICK, **options):
    model = TwoTower(*arguments, **options)
    optimizer = keras.optimizers.Adam(0.05, gradient_accumulation_steps=2)
    model.compile(optimizer, **way)
    model(data_of())
    model.optimizer.build(model.trainable_variables)  # so that it can be loaded
    return model


def fit(model, *callbacks, epochs=2, rows=ROWS, **options):
    return model.fit(
        data_of(rows=rows),
        batch_size=8,
        epochs=epochs,
        shuffle=False,
        verbose=0,
        callbacks=list(callbacks),
        **options,
    ).history


def host(handler, array):
    return np.array(handler.backend.to_host(array))


def state_of(model):
    handler = model.cache.handler
    caches = handler._store.read()
    arrays = [handler.cache.age, *handler.cache.data.values(), caches.window]
    draws = handler.backend.generator_state(handler.cache_loss.generator)[1]
    return [*(host(handler, array) for array in arrays), np.asarray(draws)]


def assert_equal(ours, theirs):
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(mine, other)


def test_no_other_frameworks_adapter_is_imported():
    assert LOADED == []
    assert {f"negcache_{BACKEND}"} <= set(sys.modules)


WAYS = {
    "tensorflow": [{"run_eagerly": True}, {"steps_per_execution": 3}, {"jit_compile": True}],
    "jax": [{"steps_per_execution": 3}, {"run_eagerly": True}],
    "torch": [{"jit_compile": "auto"}, {"run_eagerly": True}],
}[BACKEND]


def test_every_way_of_fit_gives_the_same_figures():
    """Draws of the highest score, since TensorFlow's XLA draws other random numbers."""
    first, expected = None, None
    # Without jit JAX compiles operations in each step.
    epochs, rows, filled = (1, 12, [0.25]) if BACKEND == "jax" else (2, 20, [0.5, 1.0])
    for way in WAYS:
        model = model_of(greedy=True, way=way)
        options = {"validation_data": (data_of(2, 8),)} if first is None else {}
        history = fit(model, epochs=epochs, rows=rows, **options)
        if first is None:
            first, expected = model, history
            assert sorted(history) == sorted([*SHOWN, *(f"val_{name}" for name in SHOWN)])
        for name in SHOWN:
            np.testing.assert_allclose(history[name], expected[name], rtol=2e-3, atol=1e-6)
        np.testing.assert_array_equal(state_of(model)[0], state_of(first)[0])
    # Batches of 8 and 4 into 16 slots: the fill before each step, and after the epoch.
    np.testing.assert_allclose(expected["cache_fill"], filled)
    assert expected["val_cache_fill"] == ([0.75] if BACKEND == "jax" else [1.0, 1.0])
    assert min(expected["cache_staleness"]) > 0


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two epochs, saved in every way, and the two that follow."""
    folder = tmp_path_factory.mktemp("saved")
    model = model_of()
    fit(
        model,
        keras.callbacks.ModelCheckpoint(folder / "model.weights.h5", save_weights_only=True),
        keras.callbacks.ModelCheckpoint(folder / "model.keras"),
        keras.callbacks.BackupAndRestore(folder / "backup", delete_checkpoint=False),
    )
    state = state_of(model)
    return folder, state, fit(model, epochs=4, initial_epoch=2), state_of(model)


@pytest.mark.parametrize("way", ["model.weights.h5", "model.keras", "backup"])
def test_a_resumed_fit_goes_on_bit_for_bit(saved, way):
    folder, state, further, last = saved
    callbacks, options = [], {"initial_epoch": 2}
    if way == "model.keras":
        model = keras.saving.load_model(folder / way, safe_mode=True)
    else:
        model = model_of(seed=99)
        assert any(
            (mine != other).any() for mine, other in zip(state_of(model), state, strict=True)
        )
    if way == "model.weights.h5":
        model.load_weights(folder / way)
    if way == "backup":
        callbacks = [keras.callbacks.BackupAndRestore(folder / way, delete_checkpoint=False)]
        options = {}  # it knows the epoch
    else:
        assert_equal(state_of(model), state)
    if way == "model.keras":
        model.evaluate(data_of(2), batch_size=8, verbose=0)  # moves nothing, no draw either
        assert_equal(state_of(model), state)
    assert fit(model, *callbacks, epochs=4, **options) == further
    assert_equal(state_of(model), last)


def test_a_file_that_does_not_fit_is_refused_in_the_handlers_words(saved, tmp_path):
    path = saved[0] / "model.weights.h5"
    other = model_of(capacity=12)
    step_by_hand(other)
    before = state_of(other)
    with pytest.raises(ValueError, match="has 16 slots: expected 12"):
        other.load_weights(path)
    assert_equal(state_of(other), before)
    bare = model_of(cached=False)
    bare.save_weights(tmp_path / "bare.weights.h5")
    with pytest.raises(ValueError, match="has no negative cache: it was saved"):
        other.load_weights(tmp_path / "bare.weights.h5")
    with pytest.warns(UserWarning, match="could not be loaded"):
        other.load_weights(tmp_path / "bare.weights.h5", skip_mismatch=True)
    assert_equal(state_of(other), before)
    np.testing.assert_array_equal(
        *(keras.ops.convert_to_numpy(each.item_tower.kernel) for each in (other, bare))
    )


def step_by_hand(model, network=None, rows=None, **options):
    """Run a step outside of fit, without a gradient."""
    x = {key: keras.ops.convert_to_tensor(value[:4]) for key, value in data_of().items()}
    if network is None:
        return model.compute_loss(x, None, model(x))
    features = {"x": cast(x["item"], "bfloat16"), "seen": x["id"] > 0}
    features |= {"id": cast(x["id"], LONG), "small": cast(x["id"], "uint16")}
    return model.cache.compute_loss(network, *model(x), features, **options)


def test_a_file_of_another_backend_gives_its_rows(tmp_path):
    model, other, store = model_of(), model_of(seed=5), {}
    step_by_hand(other)
    other.cache.save_own_variables(store)
    path = tmp_path / "cache"
    store["negative_cache"].tofile(path)
    arrays, _ = files.read_arrays(path)
    files.write_arrays(path, arrays, [("another's draws", 0)])
    draws = state_of(model)[-1]
    with pytest.warns(UserWarning, match="saved by another backend of Keras"):
        model.cache.load_own_variables({"negative_cache": np.fromfile(path, "uint8")})
    assert_equal(state_of(model)[:-1], state_of(other)[:-1])
    np.testing.assert_array_equal(state_of(model)[-1], draws)


def boom(rows):
    raise RuntimeError("boom")


def narrow(rows):
    return keras.ops.zeros((rows["x"].shape[0], WIDTH + 1))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("network", "error"), [(boom, "boom"), (narrow, r"expected \(4, 4\)|width")]
)
def test_an_error_changes_nothing(network, error, training):
    model = model_of()
    step_by_hand(model)
    before = state_of(model)
    with pytest.raises((RuntimeError, ValueError), match=error):
        step_by_hand(model, network, training=training)
    assert_equal(state_of(model), before)


class Linear(keras.Model):
    """Two matrices, so that a loop can be written by hand; rows with ids and groups."""

    def __init__(self, loss, rate, **way):
        super().__init__()
        first, second = weights()
        self.query = self.add_weight(shape=first.shape, name="query")
        self.item = self.add_weight(shape=second.shape, name="item")
        self.query.assign(first), self.item.assign(second)
        self.cache = CacheLayer(loss)
        self.compile(keras.optimizers.SGD(rate), **way)

    def call(self, x):
        return keras.ops.matmul(x["query"], self.query), keras.ops.matmul(x["item"], self.item)

    def compute_loss(self, x, y, y_pred, sample_weight=None, training=True):
        network = lambda rows: keras.ops.matmul(rows["x"], self.item)
        labels = {"id": x["id"], "group": x["group"]}
        return self.cache.compute_loss(
            network, *y_pred, {"x": x["item"]}, labels=labels, training=training
        )


def weights():
    return np.random.default_rng(3).standard_normal((2, 3, WIDTH)).astype("float32")


def linear_data():
    data = data_of()
    return {**data, "id": data["id"] % 7, "group": data["id"] % 2}


def linear_loss(make):
    number = negcache.FieldSpec((), "int32")
    return make(
        12,
        {"x": negcache.FieldSpec((3,), "float32")},
        WIDTH,
        scale=2.0,
        labels={"id": number, "group": number},
        id_keys=("id",),
        group_key="group",
        **({} if BACKEND == "jax" and make is negcache.NegativeCacheLoss else {"generator": 7}),
    )


def own_loop(rate):
    """Train by the adapter alone; return the losses and the cache."""
    loss_fn, losses = linear_loss(negcache.NegativeCacheLoss), []
    query, item = weights()
    state = loss_fn.init(framework.random.key(7)) if BACKEND == "jax" else None
    for start in tuple(range(0, ROWS, 8)) * 2:
        x = {key: value[start : start + 8] for key, value in linear_data().items()}
        arguments = x["query"], x["item"], {key: x[key] for key in ("id", "group")}
        value, query, item, state = BY_HAND[BACKEND](loss_fn, state, query, item, rate, *arguments)
        losses.append(float(host(loss_fn, value)))
    return losses, (loss_fn.cache if state is None else state.caches["cache"])


def step_of(loss_fn, *before, query, item, x_query, x_item, labels):
    network = lambda rows: rows["x"] @ item
    return loss_fn(*before, network, x_query @ query, x_item @ item, {"x": x_item}, labels=labels)


def by_tensorflow(loss_fn, state, query, item, rate, x_query, x_item, labels):
    query, item = map(framework.Variable, (query, item))
    with framework.GradientTape() as tape:
        given = {"x_query": x_query, "x_item": framework.constant(x_item), "labels": labels}
        value = step_of(loss_fn, query=query, item=item, **given)
    slopes = tape.gradient(value, (query, item))
    return value, *(w - rate * d for w, d in zip((query, item), slopes, strict=True)), None


def by_torch(loss_fn, state, query, item, rate, x_query, x_item, labels):
    tensor = framework.as_tensor
    query, item = (tensor(each).detach().requires_grad_() for each in (query, item))
    labels = {key: tensor(value) for key, value in labels.items()}
    given = {"x_query": tensor(x_query), "x_item": tensor(x_item), "labels": labels}
    value = step_of(loss_fn, query=query, item=item, **given)
    value.backward()
    return value, query - rate * query.grad, item - rate * item.grad, None


@functools.cache
def jitted(loss_fn):
    def loss(pair, state, x_query, x_item, labels):
        given = {"x_query": x_query, "x_item": x_item, "labels": labels}
        return step_of(loss_fn, state, query=pair[0], item=pair[1], **given)

    return framework.jit(framework.value_and_grad(loss, has_aux=True))


def by_jax(loss_fn, state, query, item, rate, x_query, x_item, labels):
    (value, state), slopes = jitted(loss_fn)((query, item), state, x_query, x_item, labels)
    return value, query - rate * slopes[0], item - rate * slopes[1], state


BY_HAND = {"tensorflow": by_tensorflow, "torch": by_torch, "jax": by_jax}


class Losses(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.found = []

    def on_train_batch_end(self, batch, logs=None):
        self.found.append(logs["loss"])
        self.model.reset_metrics()


def test_fit_is_the_adapters_own_loop():
    losses, cache = own_loop(0.1)
    model, seen = Linear(linear_loss(NegativeCacheLoss), 0.1), Losses()
    options = {"batch_size": 8, "epochs": 2, "shuffle": False, "verbose": 0}
    model.fit(linear_data(), callbacks=[seen], **options)
    np.testing.assert_allclose(seen.found, losses, rtol=1e-4)
    own = model.cache.handler
    np.testing.assert_array_equal(host(own, own.cache.age), host(own, cache.age))
    for key, rows in own.cache.data.items():
        np.testing.assert_allclose(host(own, rows), host(own, cache.data[key]), rtol=1e-3, atol=1e-5)


def test_where_nothing_learns_nothing_is_stale():
    model = Linear(linear_loss(NegativeCacheLoss), 0.0)
    options = {"batch_size": 8, "epochs": 3, "shuffle": False, "verbose": 0}
    history = model.fit(linear_data(), **options).history
    assert max(history["cache_staleness"]) < 1e-11  # the mean of three steps
    assert history["cache_fill"][-1] == 1


def test_a_policy_of_half_precision_trains():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = TwoTower()
    finally:
        keras.config.set_dtype_policy("float32")
    model.compile(keras.optimizers.Adam(0.05))
    history = fit(model, epochs=1)
    assert np.isfinite(history["loss"]).all()
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    loss = model.train_on_batch({key: value[:8] for key, value in data_of().items()})
    assert np.isfinite(loss).all()
    assert state_of(model)[0].min() == 0


def test_weights_leave_the_cache_alone():
    """So EarlyStopping restores towers and not a cache, on every backend alike."""
    model = model_of()
    weights, state = model.get_weights(), state_of(model)
    assert len(weights) == 4
    step_by_hand(model)
    after = state_of(model)
    assert any((mine != other).any() for mine, other in zip(after, state, strict=True))
    model.set_weights(weights)
    assert_equal(state_of(model), after)
    held = {"jax": 8}.get(BACKEND, 0)  # rows of five fields, ages, the window and the key
    assert len(model.non_trainable_variables) == held


def test_the_handler_has_its_own_methods():
    model = model_of()
    handler, data = model.cache.handler, data_of()
    x = {key: keras.ops.convert_to_tensor(value) for key, value in data.items()}
    features = {"x": cast(x["item"], "bfloat16"), "seen": x["id"] > 0}
    features |= {"id": cast(x["id"], LONG), "small": cast(x["id"], "uint16")}
    features = {key: value[:10] for key, value in features.items()}
    network = lambda rows: model.item_tower(cast(rows["x"], "float32"))
    handler.prefill(network, features, 5)
    assert (state_of(model)[0] == 0).sum() == 10
    handler.refresh(network, 3)
    assert isinstance(repr(handler), str)
    if BACKEND == "jax":
        handler.resize(12)
        fit(model, epochs=1)
        assert state_of(model)[0].shape == (12,)
    handler.reset()
    assert (state_of(model)[0] == negcache.EMPTY).all()


def test_bad_arguments_are_refused_in_words(monkeypatch):
    with pytest.raises(negcache.KindError, match="is a str: expected a NegativeCacheLoss"):
        CacheLayer("handler")
    other = negcache_core.NegativeCacheLoss(4, {"x": np.zeros((1, 2), "float32")}, 2)
    with pytest.raises(negcache.KindError, match=f"is one for numpy, and Keras runs on {BACKEND}"):
        CacheLayer(other)
    manager = negcache.CacheManager(
        {key: negcache.FieldSpec((2,), "float32") for key in ("x", "e")}, 4
    )
    own = negcache.CacheLossHandler(manager, lambda **_: None, "e", ("x",))
    with pytest.raises(negcache.KindError, match="the handler's loss is a function: expected a"):
        CacheLayer(own)
    several = negcache.MultiCacheLossHandler(
        {"a": manager}, negcache.CacheClassificationLoss("e", ("x",))
    )
    with pytest.raises(negcache.KindError, match="is a MultiCacheLossHandler: expected a Neg"):
        CacheLayer(several)
    model = model_of(shown=("fil",))
    before = state_of(model)
    with pytest.raises(negcache.KeysError, match=r"shown has \['fil'\]: expected names among"):
        step_by_hand(model)
    assert_equal(state_of(model), before)
    with monkeypatch.context() as patch:
        patch.setattr(keras.config, "backend", lambda: "numpy")
        patch.setattr(layer, "HOST", None)
        chosen = importlib.reload(negcache_keras._chosen)
        for make in (CacheLayer, chosen.NegativeCacheLoss):
            with pytest.raises(negcache.OptionError, match="Keras runs on numpy, and negcache_ker"):
                make(own)
    importlib.reload(negcache_keras._chosen)


def test_a_layer_made_while_shapes_are_found_is_refused():
    handler = loss_of(4)

    class Late(keras.layers.Layer):
        def call(self, x):
            CacheLayer(handler)
            return x

    with pytest.raises(negcache.OptionError, match=r"make it in the model's __init__"):
        Late()(keras.KerasTensor((2, 3)))


@ON_JAX
def test_seeds_and_handlers_of_jax():
    random = framework.random
    by_key, by_seed = (CacheLayer(loss_of(4, seed)) for seed in (random.key(5), 5))
    assert_equal(state_of(SimpleNamespace(cache=by_key)), state_of(SimpleNamespace(cache=by_seed)))
    keys = []
    for _ in range(2):
        keras.utils.set_random_seed(3)
        plain = negcache.NegativeCacheLoss(4, {"x": np.zeros((1, 2), "float32")}, 2)
        keys.append(state_of(SimpleNamespace(cache=CacheLayer(plain)))[-1])
    np.testing.assert_array_equal(*keys)
    for wrong in (True, 1.5):
        with pytest.raises(negcache.KindError, match="expected None, an int seed, or a key of"):
            loss_of(4, wrong)
    with pytest.raises(negcache.OptionError, match="set a keras.distribution, under which"):
        loss_of(4, group="data")


@ON_JAX
def test_a_cache_that_fit_has_taken_is_not_read_past_the_model():
    model = model_of()

    class Look(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            with pytest.raises(negcache.OptionError, match="in the middle of a fit, which keeps"):
                state_of(model)
            assert state_of(self.model)[0].min() == 0

    model.fit(data_of(rows=8), batch_size=8, verbose=0, callbacks=[Look()])


@ON_JAX
def test_a_distribution_trains_as_one_device_does(saved, monkeypatch):
    distribution = keras.distribution.DataParallel(devices=keras.distribution.list_devices()[:2])
    lone = model_of()
    before, age = fit(lone, epochs=1), state_of(lone)[0]
    keras.distribution.set_distribution(distribution)
    try:
        with pytest.raises(negcache.OptionError, match="set it before the model is made"):
            step_by_hand(lone)
        model = model_of()
        history = fit(model, epochs=1)
        for name, values in before.items():
            np.testing.assert_allclose(history[name], values, rtol=1e-3, atol=1e-5, err_msg=name)
        np.testing.assert_array_equal(state_of(model)[0], age)
        model.load_weights(saved[0] / "model.weights.h5")
        assert_equal(state_of(model), saved[1])
        assert len(model.cache.handler.cache.age.sharding.device_set) == 2
    finally:
        keras.distribution.set_distribution(None)
    monkeypatch.setattr(framework, "process_count", lambda: 2)
    with pytest.raises(negcache.OptionError, match="2 processes train, and Keras's files"):
        step_by_hand(lone)


@ON_TENSORFLOW
def test_replicas_of_tensorflow_are_refused():
    loss = negcache.DistributedCacheClassificationLoss("e", ("x",))
    specs = {key: negcache.FieldSpec((2,), "float32") for key in ("x", "e")}
    sharded = negcache.CacheLossHandler(negcache.CacheManager(specs, 4), loss)
    with pytest.raises(negcache.OptionError, match="in shards, whose state Keras's files cannot"):
        CacheLayer(sharded)
    devices = framework.config.list_physical_devices("CPU")
    assert devices
    model = model_of()
    strategy = framework.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    with strategy.scope(), pytest.raises(negcache.OptionError, match="on several replicas, whose"):
        step_by_hand(model)


@ON_TENSORFLOW
def test_tensorboard_shows_the_figures(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = model_of(way={"jit_compile": False})
    history = fit(model, keras.callbacks.TensorBoard(tmp_path, update_freq=1))
    shown = {}
    for path in tmp_path.rglob("events.*"):
        accumulator = EventAccumulator(str(path)).Reload()
        for tag in accumulator.Tags()["tensors"]:
            events = accumulator.Tensors(tag)
            shown[tag] = [float(framework.make_ndarray(event.tensor_proto)) for event in events]
    assert not [tag for tag in shown if tag.startswith("cache/")]  # one step for all, in a graph
    for name in SHOWN:
        np.testing.assert_allclose(shown[f"epoch_{name}"], history[name], rtol=1e-4, atol=1e-6)
        assert len(shown[f"batch_{name}"]) == 6


@ON_TORCH
def test_processes_of_torch_are_refused(monkeypatch):
    model, ranks = model_of(), framework.distributed
    monkeypatch.setattr(ranks, "is_initialized", lambda: True)
    monkeypatch.setattr(ranks, "get_world_size", lambda: 2)
    with pytest.raises(negcache.OptionError, match="2 processes train, each with a cache of its"):
        step_by_hand(model)


@ON_TORCH
def test_torch_compiles_it(monkeypatch):
    """What Dynamo traces is the question, and not the C++ that would be made of it."""
    compiled = functools.partial(framework.compile, backend="eager")
    monkeypatch.setattr(framework, "compile", compiled)
    x = {key: value[:8] for key, value in linear_data().items()}
    found = []
    for compiles in (False, True):
        model = Linear(linear_loss(NegativeCacheLoss), 0.1, jit_compile=compiles)
        found.append(model.fit(x, batch_size=8, epochs=2, shuffle=False, verbose=0).history)
    assert max(found[0]["cache_fill"]) > 0
    for name, values in found[0].items():
        np.testing.assert_allclose(found[1][name], values, rtol=1e-4)


@ON_TORCH
def test_torch_modules_do_not_see_the_cache():
    model = model_of()
    assert not any("cache" in name for name, _ in model.named_parameters())
    before = state_of(model)
    model.half()
    model.eval()
    assert model.cache.handler.training
    assert_equal(state_of(model), before)
