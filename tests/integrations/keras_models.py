"""Models with a cache, and their state, on the backend that KERAS_BACKEND names.

Fields are of dtypes that HDF5, or Keras's own variables, do not hold on every backend.
"""

import importlib
import sys

import keras
import numpy as np
import pytest
from negcache_keras import CacheLayer, NegativeCacheLoss, layer

BACKEND = keras.config.backend()
OTHERS = sorted(name for name in ("tensorflow", "jax", "torch") if name != BACKEND)
LOADED = [name for name in OTHERS if f"negcache_{name}" in sys.modules]
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
        {"x": negcache.FieldSpec((3,), stored)},
        negcache.FieldSpec((WIDTH,), {"bfloat16": "int8"}.get(stored, stored)),
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
    def __init__(
        self, capacity=16, seed=0, *, cached=True, greedy=False, shown=layer.SHOWN, **options
    ):
        super().__init__(**options)
        keras.utils.set_random_seed(seed)
        self.query_tower, self.item_tower = keras.layers.Dense(WIDTH), keras.layers.Dense(WIDTH)
        drawn, self.stored = {}, "bfloat16"
        if greedy:  # XLA would leave out rounding to bfloat16 where it can
            self.stored = "float32"
            drawn = {"retrieval_fn": negcache.MaxScoreRetrievalFn(), "stored": "float32"}
        self.cache = CacheLayer(loss_of(capacity, seed, **drawn), shown) if cached else None

    def call(self, x):
        return self.query_tower(x["query"]), self.item_tower(x["item"])

    def compute_loss(self, x, y, y_pred, sample_weight=None, training=True):
        labels = {"id": cast(x["id"], LONG), "small": cast(x["id"], "uint16")}
        return self.cache.compute_loss(
            lambda rows: self.item_tower(cast(rows["x"], "float32")),
            *y_pred,
            {"x": cast(x["item"], self.stored)},
            labels={**labels, "seen": x["id"] > 0},
            training=training,
        )


def data_of(seed=1, rows=ROWS):
    query, item = np.random.default_rng(seed).standard_normal((2, rows, 3)).astype("float32")
    return {"query": query, "item": item, "id": np.arange(rows, dtype="int32") - 5}


# What is quick to start: a graph of TensorFlow's is not, nor is JAX without one.
QUICK = {"run_eagerly": BACKEND != "jax"}


def model_of(*arguments, way=QUICK, optimizer=keras.optimizers.Adam, **options):
    model = TwoTower(*arguments, **options)
    model.compile(optimizer(0.05, gradient_accumulation_steps=2), **way)
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


def step_by_hand(model, network=None, rows=None, **options):
    """Run a step outside of fit, without a gradient."""
    x = {key: keras.ops.convert_to_tensor(value[:4]) for key, value in data_of().items()}
    if network is None:
        return model.compute_loss(x, None, model(x))
    features = {"x": cast(x["item"], "bfloat16"), "seen": x["id"] > 0}
    features |= {"id": cast(x["id"], LONG), "small": cast(x["id"], "uint16")}
    return model.cache.compute_loss(network, *model(x), features, **options)


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
        return self.cache.compute_loss(
            lambda rows: keras.ops.matmul(rows["x"], self.item),
            *y_pred,
            {"x": x["item"]},
            labels={"id": x["id"], "group": x["group"]},
            training=training,
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
