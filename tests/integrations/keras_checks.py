"""Any model: fit, files and errors, on the backend that KERAS_BACKEND names.

test_keras.py runs these checks once for each backend.
"""

import importlib

import keras
import negcache_keras
import numpy as np
import pytest
from keras_models import (
    BACKEND,
    LOADED,
    LONG,
    SHOWN,
    WIDTH,
    TwoTower,
    assert_equal,
    cast,
    data_of,
    fit,
    loss_of,
    model_of,
    negcache,
    state_of,
    step_by_hand,
)
from negcache_keras import CacheLayer, layer

import negcache_core
from negcache_core import files

# Of Keras's own code, which turns a variable into a NumPy array.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def test_no_other_frameworks_adapter_is_imported():
    assert LOADED == []
    assert negcache.__name__ == f"negcache_{BACKEND}"


WAYS = {
    "tensorflow": [{"run_eagerly": True}, {"steps_per_execution": 3}, {"jit_compile": True}],
    "jax": [{"steps_per_execution": 3}, {"run_eagerly": True}],
    "torch": [{"jit_compile": "auto"}, {"run_eagerly": True}],
}[BACKEND]


def test_every_way_of_fit_gives_the_same_figures():
    """Draws of the highest score, since TensorFlow's XLA draws other random numbers.

    By SGD: Adam makes a step of the rounding errors of a slope that is 0.
    """
    first, expected = None, None
    # Without jit JAX compiles operations in each step.
    epochs, rows, filled = (1, 12, [0.25]) if BACKEND == "jax" else (2, 20, [0.5, 1.0])
    for way in WAYS:
        model = model_of(greedy=True, way=way, optimizer=keras.optimizers.SGD)
        options = {"validation_data": (data_of(2, 8),)} if first is None else {}
        history = fit(model, epochs=epochs, rows=rows, **options)
        if first is None:
            first, expected = model, history
            assert sorted(history) == sorted([*SHOWN, *(f"val_{name}" for name in SHOWN)])
        for name in SHOWN:
            np.testing.assert_allclose(history[name], expected[name], rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(state_of(model)[0], state_of(first)[0])
    # Batches of 8 and 4 into 16 slots: the fill before each step, and after the epoch.
    np.testing.assert_allclose(expected["cache_fill"], filled)
    assert expected["val_cache_fill"] == ([0.75] if BACKEND == "jax" else [1.0, 1.0])
    assert BACKEND == "jax" or min(expected["cache_staleness"]) > 0


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
    held = {"jax": 9}.get(BACKEND, 0)  # rows of five fields, scales, ages, the window and the key
    assert len(model.non_trainable_variables) == held


def test_the_handler_has_its_own_methods():
    model = model_of()
    handler, data = model.cache.handler, data_of()
    x = {key: keras.ops.convert_to_tensor(value) for key, value in data.items()}
    features = {"x": cast(x["item"], "bfloat16"), "seen": x["id"] > 0}
    features |= {"id": cast(x["id"], LONG), "small": cast(x["id"], "uint16")}
    features = {key: value[:10] for key, value in features.items()}

    def network(rows):
        return model.item_tower(cast(rows["x"], "float32"))

    handler.prefill(network, features, 5)
    assert (state_of(model)[0] == 0).sum() == 10
    handler.refresh(network, 3)
    assert isinstance(repr(handler), str)
    if BACKEND == "jax":
        handler.resize(12)
        slots = {variable.shape[0] for variable in model.non_trainable_variables}
        assert 12 in slots
        assert 16 not in slots
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
    if BACKEND != "jax":
        with monkeypatch.context() as patch:
            patch.setattr(keras.distribution, "distribution", lambda: "a mesh")
            with pytest.raises(negcache.OptionError, match="a cache is for one device there"):
                CacheLayer(loss_of(4))
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
