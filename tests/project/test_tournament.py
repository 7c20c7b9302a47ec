"""A tiny tournament from end to end, and that nothing is chosen by the test queries."""

import json

import numpy as np
import pytest

BUDGET = 2_000
CACHE = {"cache_size": 64}


def test_two_methods_learn_and_are_not_trained_again(tournament, tmp_path, capsys):
    path = tmp_path / "results.jsonl"
    places = tournament.running.Places(path)
    runs = [tournament.run_of(method) for method in ("in-batch", "cache")]
    tournament.running.run_all([*runs, *runs], places)
    assert "2 runs, 2 of them to do" in capsys.readouterr().out
    before = path.read_text()
    tournament.running.run_all(runs, places)
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
    task = tournament.tiny()
    curves = [
        tournament.training.train(tournament.run_of("cache", budget=500), task)["curve"]
        for _ in range(2)
    ]
    for first, second in zip(*curves, strict=True):
        assert {**first, "seconds": 0} == {**second, "seconds": 0}


@pytest.mark.parametrize("cut", [1, 2, 100])
def test_a_line_that_was_cut_short_is_run_again(tournament, tmp_path, cut):
    path = tmp_path / "results.jsonl"
    runs = [tournament.run_of(budget=100, seed=seed) for seed in (0, 1, 2)]
    tournament.running.run_all(runs[:2], tournament.running.Places(path))
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    # Only the end of the line is missing: nothing is lost.
    assert len(tournament.results.read(path)) == (2 if cut == 1 else 1)
    tournament.running.run_all(runs, tournament.running.Places(path))
    assert [row["seed"] for row in tournament.results.read(path)] == [0, 1, 2]
    assert path.read_bytes().endswith(b"\n")


def test_a_file_of_runs_is_trained_once_and_by_processes(tournament, tmp_path, monkeypatch, capsys):
    wanted, path, cached = (tmp_path / name for name in ("runs.jsonl", "found.jsonl", "tasks"))
    runs = [
        tournament.run_of(method, budget=100, options={"symmetric": 0.5}, seed=seed)
        for method in ("in-batch", "cache")
        for seed in (0, 1)
    ]
    wanted.write_text("".join(json.dumps(run._asdict()) + "\n" for run in runs))
    # Other processes have no task of this name but by what is kept here.
    tournament.keeping.save(cached / "tiny.npz", tournament.tiny())
    arguments = ["", "run", "--runs", str(wanted), "--out", str(path), "--tasks-cache", str(cached)]

    def run(*more):
        monkeypatch.setattr("sys.argv", [*arguments, *more])
        tournament.script.main()
        return capsys.readouterr().out

    assert "4 runs were not begun" in run("--stop-after", "0")
    assert not path.exists()
    run("--processes", "2")
    found = tournament.results.read(path)
    names = {tournament.results.name_of(row) for row in found}
    assert names == {tournament.results.name_of(each) for each in runs}
    assert len(path.read_text().splitlines()) == 4
    alone = tournament.training.train(runs[-1], tournament.tiny())
    (same,) = (row for row in found if (row["method"], row["seed"]) == ("cache", 1))
    for mine, theirs in zip(alone["curve"], same["curve"], strict=True):
        assert {**mine, "seconds": 0} == {**theirs, "seconds": 0}
    assert "4 runs, 0 of them to do" in run()
    with pytest.raises(SystemExit, match="leave them out"):
        run("--methods", "cache")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 1 is no JSON"),
        ('{"task": "tiny"}', "expected an object of"),
        ("[1]", "expected an object of"),
        ("method", "has method 'magic': expected one of"),
        ("task", "has task 'magic': expected one of"),
    ],
)
def test_a_file_of_runs_is_checked(tournament, tmp_path, line, words):
    path = tmp_path / "runs.jsonl"
    if line in {"method", "task"}:
        line = json.dumps({**tournament.run_of()._asdict(), line: "magic"})
    path.write_text(line + "\n")
    with pytest.raises(SystemExit, match=words):
        tournament.results.read_runs(path)


def test_a_kept_task_is_the_task(tournament, tmp_path):
    task = tournament.tiny()
    more = tournament.task.Questions(np.arange(3), np.arange(70_000, 70_006).reshape(3, 2))
    task = task._replace(test=more)
    path = tmp_path / "deep" / "tiny.npz"
    for _ in range(2):  # mined, then read
        found = tournament.keeping.kept(path, lambda: task if not path.exists() else None)
        for mine, theirs in zip(arrays_of(found), arrays_of(task), strict=True):
            np.testing.assert_array_equal(mine, theirs)
            assert mine.dtype == theirs.dtype
    assert [each.name for each in path.parent.iterdir()] == ["tiny.npz"]


def arrays_of(task):
    parts = [part if isinstance(part, tuple) else (part,) for part in task]
    return [np.asarray(array) for part in parts for array in part]


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
    more = {**rows[0], "seed": 5, "rate": 7.0}  # kept by hand, as a page cites it
    tournament.results.add(kept, more)
    tournament.script.main()
    curves = {row["rate"]: row["curve"] for row in tournament.results.read(kept)}
    assert len(curves[7.0]) == 3


def test_the_plan_has_one_grid_for_all_and_further_seeds_for_what_is_shown(tournament, rows):
    runs = tournament.plan.first_seed(["docstrings", "other"])
    rates = {}
    for run in runs:
        key = run.task, run.towers, run.method, run.batch, json.dumps(run.options)
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
