"""The demo at small size: it trains both ways, saves what it says, and the search answers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(*arguments):
    return subprocess.run(
        [sys.executable, str(EXAMPLES / "docstring_search.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    sizes = ("--steps", 30, "--max-pairs", 600, "--cache-size", 128)
    done = run("train", *sizes, "--out", out)
    assert done.returncode == 0, done.stderr[-3000:]
    return out, done


def test_train_reports_every_method(trained):
    out, done = trained
    assert "in-batch negatives" in done.stdout
    assert "cache, as in the paper" in done.stdout
    assert "cache, defaults" in done.stdout
    assert "cache of 128 slots" in done.stdout
    assert "staleness=" in done.stderr  # the progress bar
    assert done.stdout.count("parse an ISO date") == 1
    report = json.loads((out / "results.json").read_text())
    assert report["pairs"]["train"] + report["pairs"]["held_out"] == 600
    assert report["pairs"]["held_out"] > 20
    for method in report["methods"].values():
        first, last = method["curve"][0], method["curve"][-1]
        assert (first["step"], last["step"]) == (0, 30)
        assert 0 < first["mrr"] < 1
        assert last["mrr"] == method["mrr"]
    assert len(report["methods"]) == 3
    assert len({method["curve"][0]["mrr"] for method in report["methods"].values()}) == 1
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert torch.load(out / "model.pt", weights_only=True)


def test_search_answers_from_the_saved_model(trained):
    out, done = trained
    answer = run("search", "parse an ISO date", "--out", out)
    assert answer.returncode == 0, answer.stderr[-3000:]
    assert answer.stdout.strip() in done.stdout


def test_search_before_train_says_what_to_do(tmp_path):
    answer = run("search", "anything", "--out", tmp_path / "nothing")
    assert answer.returncode != 0
    assert "train" in answer.stderr
