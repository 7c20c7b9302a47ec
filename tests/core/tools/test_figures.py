"""The picture of a cache shows what is in the cache, on every backend."""

import re
import subprocess
import sys

import jax
import matplotlib.figure
import negcache_jax
import negcache_tensorflow
import negcache_torch
import numpy as np
import pytest
import tensorflow as tf
import torch

import negcache_core
from negcache_core import EMPTY, KeysError, KindError, NegativeCache, OptionError, ShapeError

SLOTS = 600
PACKAGES = {
    "numpy": (negcache_core, np.asarray),
    "torch": (negcache_torch, torch.asarray),
    "tensorflow": (negcache_tensorflow, tf.convert_to_tensor),
    "jax": (negcache_jax, jax.numpy.asarray),
}


def rows_of(written, *, age):
    """Rows whose stale embedding is `1 + age / 100` times the fresh one."""
    x = np.random.default_rng(0).normal(size=(SLOTS, 3))
    age = np.where(np.arange(SLOTS) < written, age, EMPTY).astype(np.int32)
    stale = x * (1 + np.where(age == EMPTY, 7, age) / 100)[:, None]
    return NegativeCache({"x": x, "embedding": stale}, age)


def handler_with(name, cache):
    package, _ = PACKAGES[name]
    specs = {key: package.FieldSpec((3,), "float64") for key in ("x", "embedding")}
    handler = package.CacheLossHandler(
        package.CacheManager(specs, SLOTS),
        package.CacheClassificationLoss("embedding", ("x",)),
        embedding_key="embedding",
        data_keys=("x",),
    )
    if name != "jax":
        handler.restore(cache)
        return handler
    return handler.bind(handler.restore(handler.init(jax.random.key(0)), cache))


def same(features):
    return features["x"]


def points(axes):
    """Return the dots of a panel, and the line through them."""
    dots, line = axes.lines
    return np.column_stack(dots.get_data()), np.column_stack(line.get_data())


@pytest.mark.parametrize("name", PACKAGES)
def test_the_picture_shows_the_cache(name, tmp_path):
    package, asarray = PACKAGES[name]
    age = np.random.default_rng(1).integers(0, 50, SLOTS)
    cache = rows_of(450, age=age)
    handler = handler_with(name, cache)
    history = {
        step: {"effective_negatives": asarray(np.float32(step**2)), "fill": 0.5}
        for step in (20, 10, 30)
    }
    figure = package.plot_cache(handler, same, history, rows=100)
    assert isinstance(figure, matplotlib.figure.Figure)
    ages, stale, steps = figure.axes

    heights = [patch.get_height() for patch in ages.patches]
    edges = [patch.get_x() for patch in ages.patches] + [49.5]
    assert heights == np.histogram(age[:450], edges)[0].tolist()
    assert sum(heights) == 450
    assert ages.get_title() == "age of rows: 75% of 600 slots"

    dots, line = points(stale)
    assert len(dots) == 100
    assert (dots[0, 0], dots[-1, 0]) == (age[:450].min(), age[:450].max())
    np.testing.assert_allclose(dots[:, 1], (dots[:, 0] / 100) ** 2, atol=1e-12)
    assert (np.diff(line, axis=0) >= 0).all()
    assert f"median {np.median(dots[:, 1]):.2g}" in stale.get_title()

    (line,) = steps.lines
    assert np.column_stack(line.get_data()).tolist() == [[10, 100], [20, 400], [30, 900]]
    assert steps.get_title() == "effective negatives: 900.0 in the last step"

    np.testing.assert_array_equal(np.asarray(handler.cache.age), cache.age)  # nothing is written
    figure.savefig(tmp_path / "cache.png")
    assert (tmp_path / "cache.png").read_bytes().startswith(b"\x89PNG")


def test_no_gradient_is_recorded_and_what_is_not_finite_is_left_out():
    handler = handler_with("torch", rows_of(8, age=np.arange(SLOTS)))
    tower = torch.nn.Linear(3, 3, dtype=torch.float64)
    seen = []

    def network(features):
        rows = tower(features["x"])
        rows[features["x"][:, 0] == handler.cache.data["x"][2, 0]] = torch.nan
        seen.append(rows)
        return rows

    dots, _ = points(negcache_torch.plot_cache(handler, network).axes[1])
    assert dots[:, 0].tolist() == [0, 1, 3, 4, 5, 6, 7]
    assert not seen[0].requires_grad


def test_an_empty_cache_and_several_are_drawn():
    empty = handler_with("numpy", rows_of(0, age=np.zeros(SLOTS)))
    ages, stale = negcache_core.plot_cache(empty, same).axes
    assert (ages.get_title(), stale.get_title()) == (
        "age of rows: 0% of 600 slots",
        "staleness by age: no rows",
    )
    specs = {key: negcache_core.FieldSpec((3,), "float64") for key in ("x", "embedding")}
    handler = negcache_core.MultiCacheLossHandler(
        {name: negcache_core.CacheManager(specs, 4) for name in ("news", "shop")},
        negcache_core.CacheClassificationLoss("embedding", ("x",)),
        embedding_key="embedding",
        data_keys=("x",),
    )
    handler.prefill(same, {"news": {"x": np.ones((4, 3))}, "shop": {"x": np.ones((2, 3))}}, 4)
    figure = negcache_core.plot_cache(handler, same, {})
    for axes in figure.axes[:2]:
        assert [text.get_text() for text in axes.get_legend().get_texts()] == ["news", "shop"]
    assert figure.axes[0].get_title() == "age of rows: 75% of 8 slots"
    assert figure.axes[2].get_title() == "effective negatives: no steps"


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"handler": 3}, KindError, "handler is a int: expected a CacheLossHandler"),
        ({"item_network": 3}, KindError, "item_network is 3: expected a function"),
        ({"item_network": lambda features: features["x"][:, :2]}, ShapeError, r"\(100, 3\)"),
        ({"rows": 0}, OptionError, "rows is 0: expected how many"),
        ({"rows": 2.5}, OptionError, "rows is 2.5"),
        ({"history": [1]}, KindError, "history is a list: expected a dict, step -> metrics"),
        ({"history": {"1": {}}}, KindError, r"history\['1'\] is a dict: expected int -> metrics"),
        ({"history": {1: 2.0}}, KindError, r"history\[1\] is a float"),
        ({"history": {1: {"fill": 1}}}, KeysError, r"history\[1\] has \['fill'\]: expected"),
        ({"history": {1: {"effective_negatives": "x"}}}, KindError, "'x': expected a number"),
    ],
)
def test_bad_input_is_refused(given, error, message):
    handler = handler_with("numpy", rows_of(600, age=np.zeros(SLOTS)))
    arguments = {"handler": handler, "item_network": same, "rows": 100, **given}
    with pytest.raises(error, match=message):
        negcache_core.plot_cache(**arguments)


def test_a_jax_handler_without_its_state_says_what_to_do():
    handler = handler_with("jax", rows_of(3, age=np.zeros(SLOTS)))
    bare = negcache_jax.CacheLossHandler(
        handler.cache_manager, handler.cache_loss, handler.embedding_key, handler.data_keys
    )
    with pytest.raises(KindError, match=re.escape("bound = handler.bind(state)")):
        negcache_jax.plot_cache(bare)


def test_without_matplotlib_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    handler = handler_with("numpy", rows_of(3, age=np.zeros(SLOTS)))
    with pytest.raises(ImportError, match=re.escape("pip install 'negcache[plot]'")):
        negcache_core.plot_cache(handler)


def test_nothing_is_drawn_with_before_it_is_asked_for():
    program = "import sys, negcache_core; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
