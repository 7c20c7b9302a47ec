"""The Flax NNX example: a run goes on from Orbax bit for bit, in one compilation, with its log."""

import argparse
import math
from pathlib import Path

import jax
import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
SIZES = {"width": 16, "cache-size": 64, "batch-size": 8, "max-pairs": 300, "steps": 6}
SAVES = {"save-every": 3, "log-every": 2}


@pytest.fixture
def example(monkeypatch):
    """Import the example late: whoever runs other tests need not wait for Flax and Orbax."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    import nnx_search  # noqa: PLC0415

    return nnx_search


def logged(folder):
    """Return (step, name, value) of all that TensorBoard would show."""
    from tensorboard.backend.event_processing.event_file_loader import (  # noqa: PLC0415
        EventFileLoader,
    )
    from tensorboard.util.tensor_util import make_ndarray  # noqa: PLC0415

    (file,) = folder.iterdir()
    return [
        (event.step, value.tag, make_ndarray(value.tensor).item())
        for event in EventFileLoader(str(file)).Load()
        for value in event.summary.value
    ]


def test_a_resumed_run_is_the_run_that_went_through(example, tmp_path, capsys):
    jax.clear_caches()  # after many tests it keeps no new program, and none could be counted
    sizes = {**SIZES, **SAVES, "out": tmp_path / "whole"}
    whole = example.main([word for key in sizes for word in (f"--{key}", str(sizes[key]))])
    assert capsys.readouterr().out.count("recall@10") == 2
    assert whole.train_step.jitted_fn._cache_size() == 1
    options = argparse.Namespace(**{key.replace("-", "_"): value for key, value in sizes.items()})
    options.out = tmp_path / "resumed"
    data = example.as_data(example.mine_pairs(options.max_pairs))

    resumed = example.Run(options.cache_size, options.width)
    resumed.train_step = whole.train_step
    resumed.load(tmp_path / "whole" / "step_3")
    assert resumed.step == 3
    expected = jax.tree.leaves(whole.arrays())
    assert not all(map(np.array_equal, jax.tree.leaves(resumed.arrays()), expected))
    resumed.train(data, options)
    assert all(map(np.array_equal, jax.tree.leaves(resumed.arrays()), expected))
    # What Orbax restores is bound to its device, which to jit is another kind of array.
    assert whole.train_step.jitted_fn._cache_size() == 2

    rows = example.batches(data.train, SIZES["steps"], SIZES["batch-size"])
    cache = whole.state.caches["cache"]
    written = np.asarray(cache.age) < example.negcache.EMPTY
    assert sorted(np.asarray(cache.data["id"])[written]) == sorted(data.item_of[rows.ravel()])

    assert "effective negatives" in (tmp_path / "whole" / "cache.svg").read_text()
    found = logged(tmp_path / "whole" / "log")
    assert {step for step, _, _ in found} == {2, 4, 6}
    assert {"loss", "fill", "staleness", "effective_negatives"} <= {name for _, name, _ in found}
    assert all(math.isfinite(value) for _, _, value in found)
    fill = {step: value for step, name, value in found if name == "fill"}
    assert fill[6] == pytest.approx(5 * 8 / 64)  # before the last step's items came in


def test_ranks_count_ties_and_nan_as_losses(example):
    """Two equal items share the place of the second; of NaN the last."""
    towers = example.Towers(4, example.nnx.Rngs(0))
    items = np.asarray([[1, 0], [1, 0], [2, 0]], np.int32)
    data = example.Data(items, items, *[np.arange(3)] * 3, np.arange(3)[:, None])
    assert np.asarray(example.ranks(towers, data)).tolist() == [2, 2, 1]
    broken = jax.tree.map(lambda array: array * np.nan, example.nnx.state(towers))
    example.nnx.update(towers, broken)
    assert np.asarray(example.ranks(towers, data)).tolist() == [3, 3, 3]
