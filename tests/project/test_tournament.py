"""A tiny tournament from end to end, and that nothing is chosen by the test queries."""

import json
from pathlib import Path
from types import SimpleNamespace

import negcache_torch as negcache
import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ITEMS, WORDS, BUCKETS = 300, 6, 128
BUDGET = 2_000
CACHE = {"cache_size": 64}


@pytest.fixture(scope="module")
def tournament():
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        import a_cache_never_trains_worse_than_a_batch as script  # noqa: PLC0415 - found from here on
        from tournament import (  # noqa: PLC0415
            choosing,
            drift,
            method,
            methods,
            plan,
            report,
            results,
            running,
            task,
            towers,
            training,
        )

        patch.setitem(running.TASKS, "tiny", lambda _: tiny(task))
        modules = (choosing, drift, method, methods, plan, report, results, running, task, towers)
        names = {module.__name__.rpartition(".")[2]: module for module in (*modules, training)}
        yield SimpleNamespace(script=script, **names)
    torch.set_num_threads(threads)


def tiny(tasks):
    """Return a task where an item is its query's words, each under another number."""
    rng = np.random.default_rng(0)
    queries = rng.integers(1, BUCKETS, (ITEMS, WORDS), np.int32)
    validation, test = np.arange(0, ITEMS, 10), np.arange(1, ITEMS, 10)
    return tasks.Task(
        queries=queries,
        items=BUCKETS - queries,
        item_of=np.arange(ITEMS),
        train=np.flatnonzero(np.arange(ITEMS) % 10 > 1),
        validation=tasks.Questions(validation, validation[:, None]),
        test=tasks.Questions(test, test[:, None]),
        query_buckets=BUCKETS,
        item_buckets=BUCKETS,
    )


def run_of(tournament, method="in-batch", batch=8, **changes):
    given = {"rate": 0.02, "seed": 0, "budget": BUDGET, "options": CACHE, **changes}
    return tournament.training.Run("tiny", "separate", method, batch, **given)


def test_two_methods_learn_and_are_not_trained_again(tournament, tmp_path, capsys):
    path = tmp_path / "results.jsonl"
    runs = [run_of(tournament, method) for method in ("in-batch", "cache")]
    tournament.running.run_all([*runs, *runs], path, None, 1)
    assert "2 runs, 2 of them to do" in capsys.readouterr().out
    before = path.read_text()
    tournament.running.run_all(runs, path, None, 1)
    assert "2 runs, 0 of them to do" in capsys.readouterr().out
    assert path.read_text() == before
    for row in tournament.results.read(path):
        first, *_, last = row["curve"]
        assert [point["part"] for point in row["curve"]] == [
            1 / 16,
            1 / 8,
            1 / 4,
            3 / 8,
            0.5,
            0.75,
            1,
        ]
        assert last["validation MRR"] > 2 * first["validation MRR"]
        assert BUDGET - 24 < last["calls"] <= BUDGET
        assert 0 < first["seconds"] < last["seconds"] < row["seconds"]
    report = tournament.report.report(tournament.results.read(path))
    assert "### tiny, separate towers, 2,000 encoder calls" in report
    assert '| cache `{"cache_size": 64}` | 8 | 0.02* | 1 |' in report


def test_the_same_run_has_the_same_curve(tournament):
    task = tiny(tournament.task)
    curves = [
        tournament.training.train(run_of(tournament, "cache", budget=500), task)["curve"]
        for _ in range(2)
    ]
    for first, second in zip(*curves, strict=True):
        assert {**first, "seconds": 0} == {**second, "seconds": 0}


@pytest.mark.parametrize("cut", [1, 2, 100])
def test_a_line_that_was_cut_short_is_run_again(tournament, tmp_path, cut):
    path = tmp_path / "results.jsonl"
    runs = [run_of(tournament, budget=100, seed=seed) for seed in (0, 1, 2)]
    tournament.running.run_all(runs[:2], path, None, 1)
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    # Only the end of the line is missing: nothing is lost.
    assert len(tournament.results.read(path)) == (2 if cut == 1 else 1)
    tournament.running.run_all(runs, path, None, 1)
    assert [row["seed"] for row in tournament.results.read(path)] == [0, 1, 2]
    assert path.read_bytes().endswith(b"\n")


@pytest.fixture
def spied(tournament, monkeypatch):
    """Return a function: trains by a method, and returns the result and what was seen of it."""

    def train(run):
        seen = {"weights": None, "ids": [], "trained": 0, "forward": 0, "counting": False}
        method = tournament.methods.METHODS[run.method]
        forward = tournament.towers.Tower.forward

        def counted(self, tokens):
            if seen["counting"]:
                seen["trained" if torch.is_grad_enabled() else "forward"] += len(tokens)
            return forward(self, tokens)

        def counting(function):
            def counted(*arguments):
                seen["counting"] = True
                value = function(*arguments)
                seen["counting"] = False
                return value

            return counted

        def begin(setting):
            seen["weights"] = [each.detach().clone() for each in setting.model.parameters()]
            training = method(setting)
            phases = [
                phase._replace(loss=of_phase(phase), enter=counting(phase.enter))
                for phase in training.phases
            ]
            return training._replace(phases=phases)

        def of_phase(phase):
            def loss(batch):
                seen["ids"] += batch.ids.tolist()
                return counting(phase.loss)(batch)

            return loss

        with monkeypatch.context() as patch:
            patch.setattr(tournament.towers.Tower, "forward", counted)
            patch.setitem(tournament.methods.METHODS, run.method, begin)
            return tournament.training.train(run, tiny(tournament.task)), seen

    return train


@pytest.mark.parametrize(
    ("method", "options", "trained", "forward"),
    [
        # of a batch of 8
        ("in-batch", {}, 16, 0),
        ("in-batch", {"scale": "trained"}, 16, 0),
        ("gradient-caching", {}, 16, 16),
        ("memory", {}, 16, 0),
        ("cache", {}, 24, 0),
        ("cache", {"num_samples": 3}, 40, 0),
        ("cache", {"estimator": "paper"}, 24, 0),
        ("cache", {"estimator": "shared", "in_batch_negatives": False}, 24, 0),
        ("cache", {"refresh": 5}, 24, 5),
        ("cache", {"max_staleness": None}, 24, 0),
        ("full-softmax", {}, 8, 0),  # its items have no price
    ],
)
def test_calls_are_those_that_the_towers_had(tournament, spied, method, options, trained, forward):
    result, seen = spied(run_of(tournament, method, budget=400, options={**CACHE, **options}))
    last = result["curve"][-1]
    if "refresh" in options:
        seen["forward"] += forward  # the first one is paid for, and finds an empty cache
    assert (seen["trained"], seen["forward"]) == (trained * last["steps"], forward * last["steps"])
    if method != "full-softmax":
        counted = seen["trained"] + tournament.method.FORWARD_ONLY * seen["forward"]
        assert last["calls"] == pytest.approx(counted)
    assert last["calls"] <= 400


def test_a_prefill_is_paid_for(tournament, spied):
    options = {**CACHE, "prefill": True}
    result, seen = spied(run_of(tournament, "cache", budget=400, options=options))
    last = result["curve"][-1]
    assert seen["forward"] == 64
    assert last["calls"] == pytest.approx(24 * last["steps"] + 64 / 3)
    assert last["steps"] == int((400 - 64 / 3) / 24)


@pytest.mark.parametrize(
    ("options", "warm", "early", "late", "forward"),
    [
        # steps at 16, at 24 and at 40 calls, of 960
        ({"warm_in_batch": 0.25}, 15, 30, 0, 0),
        ({"late_draws": 3}, 0, 20, 12, 0),
        ({"warm_in_batch": 0.25, "late_draws": 3}, 15, 10, 12, 0),
        ({"warm_in_batch": 0.25, "prefill": True}, 15, 29, 0, 64),
    ],
)
def test_each_phase_has_its_share_of_the_budget(
    tournament, spied, options, warm, early, late, forward
):
    run = run_of(tournament, "cache", budget=960, options={**CACHE, **options})
    result, seen = spied(run)
    last = result["curve"][-1]
    assert last["steps"] == warm + early + late
    assert seen["trained"] == 16 * warm + 24 * early + 40 * late
    assert seen["forward"] == forward
    assert last["calls"] == pytest.approx(seen["trained"] + seen["forward"] / 3)
    quarter, half = (result["curve"][place] for place in (2, 4))
    assert quarter["calls"] == pytest.approx(240, abs=13)
    assert half["calls"] == pytest.approx(480, abs=20)
    if warm:  # its items are there when the cache comes into use, or a prefill's
        assert result["curve"][3]["fill"] == 1.0
        assert "staleness" not in result["curve"][1]


def test_a_map_that_is_held_at_zero_changes_nothing(tournament):
    task = tiny(tournament.task)
    plain, held = (
        tournament.training.train(run_of(tournament, "cache", budget=500, options=options), task)
        for options in (CACHE, {**CACHE, "drift": 1e30})
    )
    for first, second in zip(plain["curve"], held["curve"], strict=True):
        for key in ("loss", "test MRR", "staleness", "calls"):
            assert first[key] == pytest.approx(second[key], rel=1e-4)


@pytest.mark.parametrize("estimator", ["paper", "shared", "exact_query"])
def test_corrected_queries_draw_as_from_a_cache_of_corrected_rows(tournament, estimator):
    generator = torch.Generator().manual_seed(0)
    width = tournament.towers.WIDTH
    rows, queries = (torch.randn(n, width, generator=generator) / 8 for n in (40, 6))
    learned = tournament.drift.DriftMap()
    turn = torch.linalg.matrix_exp(torch.randn(width, width, generator=generator) / 50)
    learned.learn(rows, rows @ turn + 0.05)
    assert learned.map.abs().amax() > 0.01

    def loss_fn(embeddings):
        handler = negcache.NegativeCacheLoss(
            40, {"row": torch.zeros(1, dtype=torch.int64)}, width, estimator=estimator, generator=0
        )
        handler.prefill(lambda given: embeddings[given["row"]], {"row": torch.arange(40)}, 40)
        return handler

    features = {"row": torch.arange(6)}
    noise = torch.rand(6, 1, 2, generator=generator)
    moved, gain = learned.of_queries(queries)
    wanted = loss_fn(learned.of_rows(rows)).retrieve(queries, features, noise=noise)
    found = loss_fn(rows).retrieve(moved, features, noise=noise)
    found = learned.of_retrieval(found, 20 * gain)
    assert torch.equal(found.features["row"], wanted.features["row"])
    names = ["log_partition", "entropy", "stale_embeddings", "readout"]
    pairs = [(getattr(found, name), getattr(wanted, name)) for name in names]
    if estimator != "paper":
        pairs += zip(found.pool, wanted.pool, strict=True)
    for mine, theirs in pairs:
        if theirs is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_the_map_foresees_how_other_rows_have_moved(tournament):
    generator = torch.Generator().manual_seed(0)
    width = tournament.towers.WIDTH
    turn = torch.linalg.matrix_exp(torch.randn(width, width, generator=generator) / 50)
    learned = tournament.drift.DriftMap()
    for _ in range(40):
        rows = torch.nn.functional.normalize(torch.randn(64, width, generator=generator))
        figures = learned.learn(rows, rows @ turn + 0.02)
    assert figures["drift_residual"] < 0.1 * figures["drift"]


def test_all_methods_have_the_same_first_weights_and_order_of_pairs(tournament, spied):
    batches = {"in-batch": 16, "gradient-caching": 12, "memory": 8, "cache": 8, "full-softmax": 4}
    assert set(batches) == set(tournament.methods.METHODS)
    seen = [
        spied(run_of(tournament, method, batch, budget=600))[1] for method, batch in batches.items()
    ]
    shortest = min(len(each["ids"]) for each in seen)
    assert shortest > ITEMS // 2
    for each in seen[1:]:
        assert each["ids"][:shortest] == seen[0]["ids"][:shortest]
        for mine, first in zip(each["weights"], seen[0]["weights"], strict=True):
            assert torch.equal(mine, first)
    other = spied(run_of(tournament, seed=1, budget=600))[1]
    assert other["ids"][:shortest] != seen[0]["ids"][:shortest]
    assert not torch.equal(other["weights"][1], seen[0]["weights"][1])


def planted(method, batch, seed=0, options=(), **parts):
    """Return a result: MRR on validation and test by part of the budget."""
    names = {"quarter": 0.25, "half": 0.5, "end": 1.0}
    return {
        "task": "tiny",
        "towers": "separate",
        "method": method,
        "batch": batch,
        "rate": 0.001,
        "seed": seed,
        "budget": 1_000,
        "options": dict(options),
        "seconds": 9.0,
        "curve": [
            {"part": names[part], "seconds": 2.0, "validation MRR": mrr[0], "test MRR": mrr[1]}
            for part, mrr in parts.items()
        ],
    }


@pytest.fixture
def rows():
    return [
        planted("in-batch", 16, quarter=(0.30, 0.32), half=(0.31, 0.9), end=(0.32, 0.9)),
        planted("in-batch", 64, quarter=(0.20, 0.9), half=(0.35, 0.36), end=(0.40, 0.40)),
        planted("in-batch", 64, 1, quarter=(0.9, 0.2), half=(0.9, 0.3), end=(0.9, 0.5)),
        planted("gradient-caching", 64, quarter=(0.1, 0.9), half=(0.36, 0.38), end=(0.39, 0.9)),
        planted("cache", 16, quarter=(0.9, 0.9), half=(0.9, 0.9), end=(0.43, 0.9)),
        planted("cache", 64, quarter=(0.2, 0.32), half=(0.3, 0.38), end=(0.44, 0.44)),
        planted("cache", 64, 1, quarter=(0.2, 0.3), half=(0.3, 0.3), end=(0.1, 0.55)),
        planted("cache", 64, 0, {"prefill": True}, quarter=(0.1, 0.1), end=(0.1, 0.1)),
        planted("cache", 128, 1, quarter=(0.9, 0.9), half=(0.9, 0.9), end=(0.9, 0.9)),
    ]


def test_batch_and_rate_are_chosen_by_validation_with_seed_0(tournament, rows):
    chosen = {
        (row["method"], *row["options"]): row["batch"] for row in tournament.choosing.choose(rows)
    }
    assert chosen == {
        ("in-batch",): 64,
        ("gradient-caching",): 64,
        ("cache",): 64,
        ("cache", "prefill"): 64,
    }
    strict = [tournament.choosing.best_baseline(rows, part) for part in (0.25, 0.5, 1.0)]
    assert [(row["method"], row["batch"]) for row in strict] == [
        ("in-batch", 16),
        ("gradient-caching", 64),
        ("in-batch", 64),
    ]


def test_the_report_shows_test_figures_of_all_seeds_and_both_ratios(tournament, rows):
    lines = tournament.report.report(rows).splitlines()
    (ours,) = (line for line in lines if line.startswith("| cache | "))
    assert [cell.strip() for cell in ours.strip("|").split("|")] == [
        *("cache", "64", "0.001*", "2"),
        *("0.310 (0.300 to 0.320)", "0.340 (0.300 to 0.380)", "0.495 (0.440 to 0.550)", "2"),
        # .62 / 1.1, .68 / .66, .99 / .9; then seed 0 alone, where the baseline has no other:
        "0.564, 1.030, 1.100",
        "1.000, 1.000, 1.100",
    ]
    assert "in-batch batch 16 rate 0.001 at 0.25 (seeds: 1)" in lines[-1]
    (prefilled,) = (line for line in lines if "prefill" in line)
    assert "| 0.100 | - | 0.100 |" in prefilled


def test_a_rate_between_others_has_no_star(tournament):
    rows = [
        {**planted("cache", 64, end=(mrr, 0.1)), "rate": rate}
        for rate, mrr in [(0.1, 0.4), (0.2, 0.5), (0.3, 0.1)]
    ]
    assert "| 64 | 0.2 |" in tournament.report.report(rows)
    assert "| 64 | 0.2* |" in tournament.report.report(rows[:2])


def test_what_is_kept_gives_the_same_report(tournament, rows, tmp_path, monkeypatch, capsys):
    found, kept = tmp_path / "found.jsonl", tmp_path / "kept.jsonl"
    for row in rows:
        row["curve"][-1]["seconds"] = 2.123456789
        tournament.results.add(found, row)
    for _ in range(2):  # the second time, from what was kept too
        arguments = ["", "keep", "--out", str(found), "--to", str(kept)]
        monkeypatch.setattr("sys.argv", arguments)
        tournament.script.main()
        after = tournament.results.read(kept)
        assert tournament.report.report(after) == tournament.report.report(rows)
        # Neither the seed 1 of what was not chosen nor the curve of a grid's other runs.
        assert len(after) == 8
        lengths = {(row["method"], row["batch"]): len(row["curve"]) for row in after}
        assert lengths["cache", 16] == 1
        assert lengths["cache", 64] == 3
        assert '"seconds":2.12346,' in kept.read_text()
    assert "8 runs, 7 of them whole" in capsys.readouterr().out


def test_the_plan_has_one_grid_for_all_and_further_seeds_for_what_is_shown(tournament, rows):
    runs = tournament.plan.first_seed(["docstrings", "other"])
    rates = {}
    for run in runs:
        key = run.task, run.method, run.batch, json.dumps(run.options)
        rates.setdefault(key, []).append(run.rate)
    assert len({tuple(each) for each in rates.values()}) == 1
    # What is tried to choose by is not run on the tasks that only report.
    assert not any(run.options for run in runs if run.task == "other")
    assert any(run.options for run in runs if run.task == "docstrings")
    more = tournament.plan.more_seeds(rows, ["tiny"])
    assert {(run.method, run.batch, run.seed) for run in more} == {
        (method, batch, seed)
        for method, batch in [
            *(("in-batch", 16), ("in-batch", 64), ("gradient-caching", 64), ("cache", 64))
        ]
        for seed in (1, 2)
    }
