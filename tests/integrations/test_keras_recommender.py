"""The Keras example at small size: what it prints holds, and its files have the cache."""

import re
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[2] / "examples"))
import keras_recommender as example

# Of Keras's own TensorBoard callback, which turns a variable into a NumPy array.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def test_it_trains_and_what_it_prints_holds(tmp_path, capsys):
    sizes = ("--epochs", "3", "--batch-size", "32", "--cache-size", "256", "--max-files", "100")
    example.main([*sizes, "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    data = example.mine(100)
    files, modules = map(int, re.search(r"(\d+) files, (\d+) modules", printed).groups())
    assert (files, modules) == (len(data.known), len(data.modules) - 1)
    popular, in_batch, cached = map(float, re.findall(r"recall@10, .*: (\d\.\d+)", printed))
    assert popular == pytest.approx(example.recall_at_10(data.features["log_q"], data), abs=1e-3)
    assert min(in_batch, cached) > 10 / modules  # what chance gives
    losses = [float(each) for each in re.findall(r" loss: (\d+\.\d+)", printed)]
    assert losses[0] > losses[2]
    assert len(re.findall(r"cache_fill: 1\.0", printed)) == 2  # 3 epochs, the first fills it
    assert list((tmp_path / "tensorboard" / "train").glob("events.*"))

    model = example.TwoTower(modules + 1, 256)
    model.compile(keras.optimizers.Adam())
    model(first_of(example.pairs_of(data), 4))
    model.optimizer.build(model.trainable_variables)
    model.load_weights(tmp_path / "model.weights.h5")
    assert example.recall_at_10(example.scores_of(model, data), data) == pytest.approx(
        cached, abs=1e-3
    )
    cache = model.cache.handler.cache
    steps = 3 * -(-np.count_nonzero(data.known) // 32)
    assert 0 < np.min(cache.age) + 1 <= np.max(cache.age) < steps
    embedded = model.item_network({key: cache.data[key] for key in ("item_id", "words")})
    stale = keras.ops.cast(cache.data["embedding"], "float32")
    assert np.mean(np.sum((embedded - stale) ** 2, axis=1)) < 0.5  # two random directions have 2


def first_of(rows, count):
    """Return the first rows of arrays in dicts."""
    return {
        key: first_of(value, count) if isinstance(value, dict) else value[:count]
        for key, value in rows.items()
    }


def test_nothing_held_out_is_trained_on():
    data = example.mine(100)
    assert not (data.known == data.held_out[:, None]).any()
    assert (data.held_out > 0).all()
    assert (np.count_nonzero(data.known, axis=1) > 1).all()  # one to find another by
    trained = np.unique(data.known[data.known > 0])
    np.testing.assert_allclose(np.exp(data.features["log_q"][trained]).sum(), 1.0, rtol=1e-5)
    pairs = example.pairs_of(data)
    own = pairs["item"]["item_id"]
    assert not (pairs["known"] == own[:, None]).any()
    np.testing.assert_array_equal(pairs["item"]["words"], data.features["words"][own])


def test_recall_is_of_the_ten_best_without_what_is_known():
    modules = 16
    data = example.Imports(
        modules=[""] * modules,
        known=np.asarray([[1, 2, 0], [1, 2, 0], [1, 0, 0]], np.int32),
        held_out=np.asarray([12, 13, 12], np.int32),
        features={},
    )
    scores = -np.arange(modules, dtype=np.float32)  # 0 is none, 1 and 2 are known: 3 to 12
    assert example.recall_at_10(scores, data) == pytest.approx(1 / 3)
    assert example.recall_at_10(np.full(modules, np.nan), data) == 0
