"""The example of item numbers: it learns, corrects for popularity, and sees to its cache."""

import argparse
from pathlib import Path

import pytest
import torch

SIZES = {"items": 400, "cache-size": 128, "batch-size": 32, "steps": 40, "eval-every": 20}


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples")
    import item_ids  # noqa: PLC0415 - a program, found once its folder is on the path

    return item_ids


@pytest.fixture
def options(tmp_path):
    # SparseAdam takes no rate of 0.
    return argparse.Namespace(
        **{key.replace("-", "_"): value for key, value in SIZES.items()}, learning_rate=1e-30
    )


def test_it_learns_by_each_method_and_draws(example, tmp_path, capsys):
    words = [word for key, value in SIZES.items() for word in (f"--{key}", str(value))]
    results = example.main([*words, "--out", str(tmp_path)])
    best, _ = example.evaluate(None, example.make_catalogue(400))
    for result in results.values():
        (_, first, _), *_, (_, last, _) = result.curve
        assert 3 * first < last < best
    popular = [results[name].curve[-1][2] for name in (example.CORRECTED, example.PLAIN)]
    assert popular[0] > popular[1]
    assert (tmp_path / "recall.svg").exists()
    example.main([*words, "--costs"])
    assert capsys.readouterr().out.count("MB of weights") == 4


def test_at_rest_no_row_is_stale_and_the_cache_stands_for_all_items(example, options):
    """The sum over corrected rows estimates that over all items, whoever put them in."""
    catalogue, options.cache_size = example.make_catalogue(400), 1024
    result = example.train(example.CORRECTED, catalogue, options)
    assert len(result.staleness) == options.steps > 2 * example.UPKEEP
    assert max(result.staleness) < 1e-10

    towers = example.Towers(catalogue.category, sparse=True)
    cached = example.Cached(towers, catalogue, 1024, 32, corrected=True)
    for seed in range(options.steps):
        queries, ids = example.draw_queries(catalogue, 32, seed)
        cached(queries, ids)
    rows = cached.loss_fn.cache.data
    assert set(rows) == {"item_id", "log_count", "embedding"}
    counts = torch.bincount(rows["item_id"], minlength=400)
    assert counts[:40].sum() > 2 * 1024 * 40 / 400  # popular items are there more often
    with torch.no_grad():
        every = {"item_id": torch.arange(400)}
        scores = 5.0 * towers.embed_queries(queries) @ towers.embed_items(every).T
        stale = 5.0 * towers.embed_queries(queries) @ rows["embedding"].T
    found = (stale - rows["log_count"]).logsumexp(dim=1) - scores.logsumexp(dim=1)
    expected = torch.full_like(found, 1024 / (1024 + 32)).log()
    torch.testing.assert_close(found, expected, atol=0.1, rtol=0)
