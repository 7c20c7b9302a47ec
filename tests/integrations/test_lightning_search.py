"""The Lightning example: a run through is a run resumed, on one process and in shards on two."""

import argparse
import csv
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from programs import ONE_THREAD, run

from negcache_core import EMPTY

ROOT = Path(__file__).parents[2]
TABLE = "handler.tables.cache_cache."
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # Lightning's own
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),  # of checkpoints: on purpose
]


@pytest.fixture(scope="module")
def ranks():
    """Import the example late: whoever runs other tests need not wait for Lightning."""
    sys.path.append(str(ROOT / "examples"))
    import lightning_ranks  # noqa: PLC0415

    return lightning_ranks


@pytest.fixture(scope="module")
def data(ranks):
    example = ranks.lightning_search
    return example.as_data(example.mine_pairs(ranks.SIZES["max-pairs"]))


def checkpoint(folder, step):
    path = folder / "checkpoints" / f"step={step}.ckpt"
    return torch.load(path, weights_only=True)


def assert_same(ours, theirs):
    """Compare all that training goes on from."""
    for key in ("state_dict", "optimizer_states", "global_step"):
        torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=0, equal_nan=True)


def assert_holds_batches(ranks, data, saved, steps):
    """The cache is not full: every item of every batch is in it, once."""
    state, batch_size = saved["state_dict"], ranks.SIZES["batch-size"]
    written = state[TABLE + "age"] < EMPTY
    assert len(written) == ranks.SIZES["cache-size"]
    rows = ranks.lightning_search.batches(data.train, steps, batch_size).ravel()
    ids = state[TABLE + "field_id"][written].tolist()
    assert sorted(ids) == sorted(data.item_of[rows].tolist())
    tokens = torch.from_numpy(data.items[ids])
    assert torch.equal(state[TABLE + "field_tokens"][written], tokens)


def test_one_process_goes_on_as_if_it_had_not_stopped_and_logs_the_metrics(ranks, data, tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    ranks.lightning_search.main(ranks.arguments(whole))
    half = whole / "checkpoints" / "step=4.ckpt"
    ranks.lightning_search.main(ranks.arguments(resumed, resume=half))
    assert_same(checkpoint(resumed, 8), checkpoint(whole, 8))
    for step in (4, 8):
        assert_holds_batches(ranks, data, checkpoint(whole, step), step)
    with (whole / "version_0" / "metrics.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [int(line["step"]) for line in lines] == [1, 3, 5, 7]
    assert {"loss", "cache/fill", "cache/staleness", "cache/effective_negatives"} <= set(lines[0])
    assert all(math.isfinite(float(value)) for line in lines for value in line.values())
    # Before the last step's items came in.
    assert float(lines[-1]["cache/fill"]) == pytest.approx(7 * 6 / 64)
    assert "staleness by age" in (whole / "cache.svg").read_text()


def test_accumulated_gradients_in_half_precision_are_those_of_a_loop_by_hand(ranks, data, tmp_path):
    example, steps = ranks.lightning_search, 2
    torch.manual_seed(0)
    module, plain = (example.DocstringSearch(64, 16) for _ in range(2))
    plain.load_state_dict(module.state_dict())
    for each in (module, plain):
        each.configure_model()
    plain.handler.load_state_dict(module.handler.state_dict())
    options = argparse.Namespace(
        devices=1,
        steps=steps,
        batch_size=6,
        save_every=4,
        log_every=2,
        resume=None,
        out=tmp_path,
    )
    more = {"accumulate_grad_batches": 2, "precision": "bf16-mixed", "enable_progress_bar": False}
    assert example.train(module, data, options, **more).global_step == steps

    optimizer = plain.configure_optimizers()
    plain.log_dict = lambda *_, **__: None
    loader = example.Batches(data, example.batches(data.train, 2 * steps, 6))
    for number, batch in enumerate(loader, 1):
        with torch.autocast("cpu", torch.bfloat16):
            loss = plain.training_step(batch) / 2
        loss.backward()
        if number % 2 == 0:
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(module.state_dict(), plain.state_dict())
    assert int((module.handler.cache.age < EMPTY).sum()) == 4 * 6


def test_two_processes_save_one_cache_and_any_number_goes_on(ranks, data, tmp_path):
    done = run(Path(__file__).with_name("lightning_ranks.py"), tmp_path, **ONE_THREAD)
    assert done.stdout.count("held-out queries among") == 2  # one process reports of each run
    whole = tmp_path / "whole"
    for step in (4, 8):
        assert_holds_batches(ranks, data, checkpoint(whole, step), step)
    assert_same(checkpoint(tmp_path / "resumed", 8), checkpoint(whole, 8))

    alone, half = tmp_path / "alone", whole / "checkpoints" / "step=4.ckpt"
    ranks.lightning_search.main(ranks.arguments(alone, resume=half))
    assert_holds_batches(ranks, data, checkpoint(alone, 8), 8)


def test_strategies_that_would_lose_shards_are_refused(ranks):
    module = ranks.lightning_search.DocstringSearch(64, 16)
    module._trainer = SimpleNamespace(strategy=object())
    with pytest.raises(TypeError, match="object would lose shards of the cache"):
        module.setup("fit")
