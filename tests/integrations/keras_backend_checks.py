"""What a model does beside the adapter's own loop, and what one backend has by itself."""

import functools
import importlib
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from keras_models import (
    BACKEND,
    ON_JAX,
    ON_TENSORFLOW,
    ON_TORCH,
    ROWS,
    SHOWN,
    Linear,
    assert_equal,
    data_of,
    fit,
    framework,
    host,
    linear_data,
    linear_loss,
    loss_of,
    model_of,
    negcache,
    state_of,
    step_by_hand,
    weights,
)
from negcache_keras import CacheLayer, NegativeCacheLoss

# Of Keras's own code, which turns a variable into a NumPy array.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


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
    def network(rows):
        return rows["x"] @ item

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
        expected = host(own, cache.data[key])
        np.testing.assert_allclose(host(own, rows), expected, rtol=1e-3, atol=1e-5)


def test_where_nothing_learns_nothing_is_stale():
    model = Linear(linear_loss(NegativeCacheLoss), 0.0)
    options = {"batch_size": 8, "epochs": 3, "shuffle": False, "verbose": 0}
    history = model.fit(linear_data(), **options).history
    assert max(history["cache_staleness"]) < 1e-11  # the mean of three steps
    assert history["cache_fill"][-1] == 1


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
    with pytest.raises(negcache.OptionError, match=r"set a keras\.distribution, under which"):
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


def distribution_of(kind):
    """Return one over two devices: of the batch, or of the rows of a table."""
    api = keras.distribution
    devices = api.list_devices()[:2]
    if kind == "data":
        return api.DataParallel(devices=devices)
    mesh = api.DeviceMesh((1, 2), ["batch", "model"], devices)
    layouts = api.LayoutMap(mesh)
    layouts["negative_cache_embedding"] = api.TensorLayout(["model", None], mesh)
    return api.ModelParallel(layout_map=layouts, batch_dim_name="batch")


def an_epoch(model):
    return model.fit(linear_data(), batch_size=8, shuffle=False, verbose=0).history


@pytest.fixture(scope="module")
def on_one_device(tmp_path_factory):
    """Return a trained model, what it showed, its state, and its file."""
    lone = Linear(linear_loss(NegativeCacheLoss), 0.1)
    history, path = an_epoch(lone), tmp_path_factory.mktemp("lone") / "lone.weights.h5"
    lone.save_weights(path)
    return lone, history, state_of(lone), path


@ON_JAX
@pytest.mark.parametrize("kind", ["data", "model"])
def test_a_distribution_trains_as_one_device_does(kind, on_one_device, monkeypatch):
    lone, expected, state, path = on_one_device
    keras.distribution.set_distribution(distribution_of(kind))
    try:
        with pytest.raises(negcache.OptionError, match="set it before the model is made"):
            state_of(lone)
        model = Linear(linear_loss(NegativeCacheLoss), 0.1)
        history = an_epoch(model)
        for name, values in expected.items():
            np.testing.assert_allclose(history[name], values, rtol=1e-3, atol=1e-5, err_msg=name)
        np.testing.assert_array_equal(state_of(model)[0], state[0])
        model.load_weights(path)
        assert_equal(state_of(model), state)
        table = model.cache.handler.cache.data["embedding"]
        assert len(table.sharding.device_set) == 2
        assert table.sharding.is_fully_replicated == (kind == "data")
    finally:
        keras.distribution.set_distribution(None)
    monkeypatch.setattr(framework, "process_count", lambda: 2)
    with pytest.raises(negcache.OptionError, match="2 processes train, and Keras's files"):
        CacheLayer(lone.cache.handler)


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
    events = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    model = model_of(way={"jit_compile": False})
    history = fit(model, keras.callbacks.TensorBoard(tmp_path, update_freq=1))
    shown = {}
    for path in tmp_path.rglob("events.*"):
        found = events.EventAccumulator(str(path)).Reload()
        for tag in found.Tags()["tensors"]:
            protos = [event.tensor_proto for event in found.Tensors(tag)]
            shown[tag] = [float(framework.make_ndarray(proto)) for proto in protos]
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
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_torch_compiles_a_step():
    """What Dynamo traces is the question, and not the C++ that would be made of it.

    Of the layer alone: a whole fit with jit_compile=True takes Dynamo half a minute.
    """
    x = {key: keras.ops.convert_to_tensor(value[:8]) for key, value in linear_data().items()}
    models = [Linear(linear_loss(NegativeCacheLoss), 0.1) for _ in range(2)]
    for model in models:
        model.compute_loss(x, None, model(x))
    ways = [model.compute_loss for model in models]
    ways[1] = framework.compile(ways[1], backend="eager")
    found = [way(x, None, model(x)) for way, model in zip(ways, models, strict=True)]
    np.testing.assert_allclose(*(each.detach() for each in found), rtol=1e-5)
    assert_equal(*map(state_of, models))


@ON_TORCH
def test_torch_modules_do_not_see_the_cache():
    model = model_of()
    assert not any("cache" in name for name, _ in model.named_parameters())
    before = state_of(model)
    model.half()
    model.eval()
    assert model.cache.handler.training
    assert_equal(state_of(model), before)
