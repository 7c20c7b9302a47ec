"""The KerasRS example at small size: it trains each way, and what it reports is right."""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import keras
import keras_rs
import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[2] / "examples"))
import keras_rs_recommender as example
import used_names


@pytest.fixture(scope="module")
def data():
    return used_names.mine(1_000)


def test_it_trains_each_way_and_runs_nothing_twice(tmp_path, capsys):
    kept = tmp_path / "runs.jsonl"
    sizes = ("--max-users", "1500", "--epochs", "2", "--batch-size", "64", "--cache-size", "64")
    once = ("--rates", "0.01", "--seeds", "0", "--results", str(kept))
    arguments = [*sizes, *once, "--picture", str(tmp_path / "recall.png"), "--verbose", "0"]
    example.main(arguments)
    printed = capsys.readouterr().out
    items = int(re.search(r"(\d+) items", printed)[1])
    rows = [json.loads(line) for line in kept.read_text().splitlines()]
    assert [row["method"] for row in rows] == list(example.METHODS)
    recalls = []
    for row in rows:
        curve = row["curve"]
        assert curve["loss"][1] < curve["loss"][0]
        at_10, at_20 = (curve[f"test_recall@{k}"][1] for k in (10, 20))
        assert 0 < at_10 <= at_20 < 1
        recalls.append(at_10)
        assert f"| tensorflow | {row['method']} | 0.01 | 1 | {at_10:.3f} (" in printed
    assert np.mean(recalls) > 2 * 10 / items  # chance gives 10 / items
    assert rows[3]["curve"]["cache_fill"][1] > 0.9
    assert (tmp_path / "recall.png").stat().st_size > 1_000

    example.main(arguments)
    again = capsys.readouterr().out
    assert again.split("|", 1)[1] == printed.split("|", 1)[1]
    assert len(kept.read_text().splitlines()) == len(rows)


def test_it_trains_on_jax(tmp_path):
    sizes = ("--max-users", "1000", "--epochs", "1", "--batch-size", "64", "--cache-size", "64")
    kept = tmp_path / "runs.jsonl"
    once = ("--methods", "cache", "--rates", "0.01", "--seeds", "0", "--results", str(kept))
    out = subprocess.run(
        [sys.executable, example.__file__, *sizes, *once, "--verbose", "0"],
        env={**os.environ, "KERAS_BACKEND": "jax"},
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert out.returncode == 0, out.stderr[-3000:]
    row = json.loads(kept.read_text())
    assert row["backend"] == "jax"
    assert 0 < row["curve"]["loss"][0] < 20  # it is NaN where a user without items has no gradient
    assert (tmp_path / "keras_rs_recall.png").exists()


def test_the_rate_is_chosen_by_validation_and_users_reported_are_others(monkeypatch):
    def train(data, method, rate, seed, options):
        curve = {"validation_recall@10": [1.0, rate], "test_recall@10": [0.0, -rate]}
        return {"backend": "", "method": method, "rate": rate, "seed": seed, "curve": curve}

    monkeypatch.setattr(example, "train", train)
    options = argparse.Namespace(
        **dict.fromkeys(("batch_size", "cache_size", "epochs", "max_users", "results")),
        methods=["in-batch", "cache"],
        rates=[0.1, 0.3, 0.2],
        seeds=[7, 8],
    )
    chosen = [(row["method"], row["rate"], row["seed"]) for row in example.compare(None, options)]
    assert chosen == [(method, 0.3, seed) for method in options.methods for seed in (7, 8)]


def test_recall_is_of_the_best_without_what_is_known(data):
    keras.utils.set_random_seed(0)
    model = example.TwoTower(data, "in-batch", 0, 0)
    model({"known": data.test.known[:1], "item": {k: v[:1] for k, v in data.items.items()}})
    recall = example.Recall(data)
    recall.set_model(model)
    logs = {}
    recall.on_epoch_end(0, logs)
    users, items = model.user_network(data.test.known), model.item_network(model.catalogue)
    scores = np.asarray(users) @ np.asarray(items).T
    np.put_along_axis(scores, data.test.known, -np.inf, axis=1)
    scores[:, 0] = -np.inf
    own = np.take_along_axis(scores, data.test.answer[:, None], axis=1)
    rank = (scores > own).sum(axis=1)
    for cutoff in (10, 20):
        assert 0 < (rank < cutoff).sum() < len(rank)
        assert logs[f"test_recall@{cutoff}"] == pytest.approx((rank < cutoff).mean(), abs=1e-6)


def test_accidental_hits_are_removed_which_keras_rs_itself_does_not():
    logits = np.asarray([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]], np.float32)
    batch = (logits, np.eye(3, dtype=np.float32), np.asarray([5, 5, 6]))
    expected = np.asarray([[1.0, -1e9, 3.0], [-1e9, 5.0, 6.0], [7.0, 8.0, 9.0]], np.float32)
    np.testing.assert_array_equal(example.WithoutAccidentalHits()(*batch), expected)
    # Where this fails, KerasRS has mended it: leave WithoutAccidentalHits out of the example.
    np.testing.assert_array_equal(keras_rs.layers.RemoveAccidentalHits()(*batch), logits)


def test_nothing_held_out_is_trained_on(data):
    parts = (data.train, data.validation, data.test)
    for known, answer in parts:
        assert not (known == answer[:, None]).any()
        assert (answer > 0).all()
        assert (np.count_nonzero(known, axis=1) > 2).all()
    sets = [{frozenset(row) for row in np.column_stack(part).tolist()} for part in parts]
    assert not sets[0] & (sets[1] | sets[2])
    assert not sets[1] & sets[2]
    trained = np.unique(data.train.answer)
    np.testing.assert_allclose(np.exp(data.items["log_q"][trained]).sum(), 1.0, rtol=1e-5)
    for key, size in (("item", ()), ("words", (used_names.WORDS,))):
        assert data.items[key].shape == (len(data.names), *size)
