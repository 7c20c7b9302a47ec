"""The Keras layer: every way of `fit`, what it shows, and what Keras's files bring back."""

import keras
import negcache_tensorflow as negcache
import numpy as np
import pytest
import tensorflow as tf
from negcache_keras import CacheLayer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

# Of Keras's own TensorBoard callback, which turns a variable into a NumPy array.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
WIDTH, ROWS = 4, 20  # batches of 8, 8 and 4
SHOWN = ["cache_effective_negatives", "cache_fill", "cache_staleness", "loss"]


def handler_of(capacity, seed=0, *, distributed=False, **options):
    specs = {
        "x": negcache.FieldSpec((3,), "bfloat16"),  # HDF5 has none
        "id": negcache.FieldSpec((), "uint64"),
        "embedding": negcache.FieldSpec((WIDTH,), "bfloat16"),
    }
    kind = "DistributedCacheClassificationLoss" if distributed else "CacheClassificationLoss"
    loss = getattr(negcache, kind)("embedding", ("x",), scale=3.0, generator=seed, **options)
    return negcache.CacheLossHandler(
        negcache.CacheManager(specs, capacity), loss, "embedding", ("x",)
    )


@keras.saving.register_keras_serializable("test_keras")
class TwoTower(keras.Model):
    def __init__(self, capacity=16, seed=0, *, greedy=False, cached=True, **options):
        super().__init__(**options)
        keras.utils.set_random_seed(seed)
        self.query_tower, self.item_tower = keras.layers.Dense(WIDTH), keras.layers.Dense(WIDTH)
        drawn = {"retrieval_fn": negcache.MaxScoreRetrievalFn()} if greedy else {}
        self.cache = CacheLayer(handler_of(capacity, seed, **drawn)) if cached else None

    def call(self, x):
        return self.query_tower(x["query"]), self.item_tower(x["item"])

    def compute_loss(self, x, y, y_pred, sample_weight=None, training=True):
        features = {"x": tf.cast(x["item"], tf.bfloat16), "id": x["id"]}
        return self.cache.compute_loss(
            lambda rows: self.item_tower(tf.cast(rows["x"], tf.float32)),
            *y_pred,
            features,
            training=training,
        )


def data_of(seed=1):
    rng = np.random.default_rng(seed)
    query, item = rng.standard_normal((2, ROWS, 3)).astype(np.float32)
    return {"query": query, "item": item, "id": np.arange(ROWS, dtype=np.uint64) + 2**63}


def model_of(*arguments, jit_compile=False, run_eagerly=False, steps_per_execution=1, **options):
    model = TwoTower(*arguments, **options)
    model.compile(
        keras.optimizers.Adam(0.05),
        jit_compile=jit_compile,
        run_eagerly=run_eagerly,
        steps_per_execution=steps_per_execution,
    )
    model(data_of())
    model.optimizer.build(model.trainable_variables)  # so that it can be loaded
    return model


def fit(model, *callbacks, epochs=2, **options):
    return model.fit(
        data_of(),
        batch_size=8,
        epochs=epochs,
        shuffle=False,
        verbose=0,
        callbacks=list(callbacks),
        **options,
    ).history


def state_of(model):
    handler = model.cache.handler
    arrays = [handler.cache.age, *handler.cache.data.values(), handler.cache_loss.generator.state]
    return [array.numpy() for array in arrays]


def assert_equal(ours, theirs):
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(mine, other)


def scalars_of(folder):
    found = {}
    for path in folder.rglob("events.*"):
        accumulator = EventAccumulator(str(path)).Reload()
        for tag in accumulator.Tags()["tensors"]:
            events = accumulator.Tensors(tag)
            values = [float(tf.make_ndarray(event.tensor_proto)) for event in events]
            found[tag] = values
    return found


def test_every_way_of_fit_gives_the_same_figures_and_tensorboard_shows_them(tmp_path):
    """Draws of the highest score, since XLA draws other random numbers."""
    board = keras.callbacks.TensorBoard(tmp_path, update_freq=1)
    evaluated = {"validation_data": (data_of(2),)}
    eager, graph, xla = (
        model_of(greedy=True, **way)
        for way in ({"run_eagerly": True}, {"steps_per_execution": 3}, {"jit_compile": True})
    )
    expected = fit(eager, **evaluated)
    assert sorted(expected) == sorted([*SHOWN, *(f"val_{name}" for name in SHOWN)])
    # Batches of 8, 8 and 4 into 16 slots: the fill before each step.
    np.testing.assert_allclose(expected["cache_fill"], [0.5, 1.0])
    assert expected["val_cache_fill"] == [1.0, 1.0]
    assert min(expected["cache_staleness"]) > 0
    trained = {name: values for name, values in expected.items() if "val" not in name}
    for model, history, wanted in (
        (graph, fit(graph, **evaluated), expected),
        (xla, fit(xla, board), trained),
    ):
        assert history.keys() == wanted.keys()
        for name, values in wanted.items():
            np.testing.assert_allclose(history[name], values, rtol=1e-4, atol=1e-6, err_msg=name)
        np.testing.assert_array_equal(state_of(model)[0], state_of(eager)[0])
    shown = scalars_of(tmp_path)
    assert not [tag for tag in shown if tag.startswith("cache/")]  # one step for all, in a graph
    for name in SHOWN:
        np.testing.assert_allclose(shown[f"epoch_{name}"], trained[name], rtol=1e-4, atol=1e-6)
        assert len(shown[f"batch_{name}"]) == 6


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two epochs, saved in every way, and the two that follow."""
    folder = tmp_path_factory.mktemp("saved")
    model = model_of(run_eagerly=True)
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
        model = model_of(seed=99, run_eagerly=True)
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
        model.evaluate(data_of(2), batch_size=8, verbose=0)  # moves nothing, no draw either
        assert_equal(state_of(model), state)
    assert fit(model, *callbacks, epochs=4, **options) == further
    assert_equal(state_of(model), last)


def test_a_file_that_does_not_fit_is_refused_in_the_handlers_words(saved, tmp_path):
    path = saved[0] / "model.weights.h5"
    other = model_of(capacity=12, run_eagerly=True)
    fit(other, epochs=1)
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
    np.testing.assert_array_equal(other.item_tower.kernel, bare.item_tower.kernel)


def test_bad_arguments_are_refused_in_words(monkeypatch):
    handler = handler_of(8)
    with pytest.raises(negcache.KindError, match=r"is a str: expected negcache_tensorflow\.Cache"):
        CacheLayer("handler")
    with pytest.raises(negcache.OptionError, match="write the training loop as docs/scaling"):
        CacheLayer(handler_of(8, distributed=True))
    own = negcache.CacheLossHandler(handler.cache_manager, lambda **_: None, "embedding", ("x",))
    with pytest.raises(negcache.KindError, match="the handler's loss is a function: expected a"):
        CacheLayer(own)
    layer, draws = CacheLayer(handler, shown=("fil",)), handler.cache_loss.generator.state.numpy()
    rows = {"x": tf.zeros((2, 3), tf.bfloat16), "id": tf.zeros(2, tf.uint64)}
    with pytest.raises(negcache.KeysError, match=r"shown has \['fil'\]: expected names among"):
        layer.compute_loss(lambda _: tf.ones((2, WIDTH)), *[tf.ones((2, WIDTH))] * 2, rows)
    assert (handler.cache.age.numpy() == negcache.EMPTY).all()
    np.testing.assert_array_equal(handler.cache_loss.generator.state, draws)
    monkeypatch.setattr(keras.config, "backend", lambda: "jax")
    with pytest.raises(negcache.OptionError, match="Keras runs on jax"):
        CacheLayer(handler)
