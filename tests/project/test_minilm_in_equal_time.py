"""The comparison on a GPU, end to end with a tiny model on the CPU: `make gpu-training`."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib as mpl
import pytest
import torch
from transformers import AutoModel

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def minilm():
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    with pytest.MonkeyPatch.context() as patch, mpl.rc_context():
        patch.syspath_prepend(ROOT / "examples")  # as `tournament` does, when it is imported first
        patch.syspath_prepend(ROOT / "benchmarks")
        import _minilm_data as data  # noqa: PLC0415 - found from here on
        import _minilm_plan as plan  # noqa: PLC0415
        import _minilm_training as training  # noqa: PLC0415
        import _pictures_of_training as pictures  # noqa: PLC0415
        import minilm_in_equal_time as script  # noqa: PLC0415

        yield SimpleNamespace(
            data=data, plan=plan, training=training, pictures=pictures, script=script
        )
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Requests of two words, whose command has the same words."""
    folder = tmp_path_factory.mktemp("nl2bash")
    for part, rows in {"train": range(60), "dev": range(60, 80), "test": range(70, 90)}.items():
        lines = [f"find w{row % 9} and v{row % 11}\tv{row % 11} -x w{row % 9}\n" for row in rows]
        (folder / f"{part}.tsv").write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.fixture
def compare(minilm, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(minilm.script, "RESULTS", tmp_path)

    def compare(*arguments):
        tiny = ["plan", "--device", "cpu", "--tiny", "--data", str(folder), "--at-once", "8"]
        out = tmp_path / "found.jsonl"
        monkeypatch.setattr(sys, "argv", ["", *tiny, "--out", str(out), *arguments])
        minilm.script.main()
        return out

    return compare


def test_it_goes_on_where_it_stopped(compare, capsys):
    out = compare("--runs", "2")
    lines = out.read_text().splitlines()
    first, *runs = map(json.loads, lines)
    assert [(row["method"], row["rate"], row["seed"]) for row in runs] == [
        ("in-batch", 0.004, 0),
        ("cache", 0.004, 0),
    ]
    for row in runs:
        assert (row["machine"], row["seconds"]) == ("cpu", first["seconds"])
        assert [point["part"] for point in row["curve"]] == [0.0, 0.25, 0.5, 0.75, 1.0]
        assert all(
            point["part"] * row["seconds"] <= point["seconds"] < 2 * row["seconds"]
            for point in row["curve"]
        )
        assert row["curve"][-1]["steps"] > 0
    assert runs[0]["curve"][0] == {**runs[1]["curve"][0], "calls": 0}

    out.write_text("\n".join([*lines[:2], lines[2][:-30]]))
    compare("--runs", "1")
    again = json.loads(out.read_text().splitlines()[-1])
    assert (again["method"], again["seconds"]) == ("cache", first["seconds"])
    shown = capsys.readouterr().out
    assert "8 pairs: a step takes" in shown
    assert f"**cpu, nl2bash, 8 pairs at once**: {first['seconds']:g} seconds" in shown
    assert "| cache, 8 | 0.004* | 1 |" in out.with_suffix(".md").read_text()
    assert "<svg" in out.with_suffix(".svg").read_text()


def test_no_run_starts_that_would_end_too_late(compare, capsys):
    with pytest.raises(SystemExit, match="has no results"):
        compare("--minutes", "0")
    assert "Time is up." in capsys.readouterr().out


def test_without_a_gpu_it_says_so(minilm, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["", "plan"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no GPU"):
        minilm.script.main()


def result(contest, rate, seed, validation, *, machine="GPU", seconds=30.0):
    def point(part):
        mrr = {"validation MRR": validation, "test MRR": 1 - validation}
        return {"part": part, "seconds": part * seconds, "steps": int(100 * part), **mrr}

    same = {"machine": machine, "task": "nl2bash", "precision": "float32", "seconds": seconds}
    curve = [point(part) for part in (0.0, 0.25, 0.5, 0.75, 1.0)]
    return {**same, **contest._asdict(), "rate": rate, "seed": seed, "curve": curve}


def trained(minilm, plan, best, **changes):
    """Run a whole plan; a rate is the worse on validation the farther it is from `best`."""
    rows, order, seconds = [], [], []
    budgets = {each.at_once: 30.0 for each in plan.contests}
    while runs := minilm.plan.left(plan, rows):
        seconds.append(minilm.plan.seconds_left(plan, rows, budgets))
        stage, contest, rate, seed = runs[0]
        order.append((stage, rate, seed))
        score = 0.5 / (1 + max(rate / best, best / rate)) + (contest.method == "cache") / 16
        rows.append(result(contest, rate, seed, score, **changes))
    assert seconds[-1] == 30.0
    assert minilm.plan.seconds_left(plan, rows, budgets) == 0.0
    return rows, order


def test_a_rate_is_climbed_to_by_validation_and_then_has_three_seeds(minilm):
    (contest, *_) = minilm.plan.FULL.contests
    plan = minilm.plan.FULL._replace(contests=(contest,))
    _, order = trained(minilm, plan, best=8e-4)
    others = [(1, 1e-4, 0), (1, 4e-4, 0), (1, 8e-4, 0), (1, 1.6e-3, 0)]
    assert order == [(0, 2e-4, 0), *others, (2, 8e-4, 1), (2, 8e-4, 2)]
    _, order = trained(minilm, plan, best=1.0)  # nothing is tried beyond eight times the first
    assert max(rate for _, rate, _ in order) == 1.6e-3
    assert order[-1] == (2, 1.6e-3, 2)


def test_the_most_telling_runs_come_first(minilm):
    rows, order = trained(minilm, minilm.plan.FULL, best=4e-4)
    assert order == sorted(order, key=lambda run: run[0])
    firsts = [(row["method"], row["batch"], row["rate"]) for row in rows[:7]]
    assert firsts == [
        ("in-batch", 64, 2e-4),
        ("cache", 64, 2e-4),
        ("gradient-caching", 256, 4e-4),
        ("in-batch", 512, 4e-4),
        ("cache", 512, 4e-4),
        ("gradient-caching", 2_048, 8e-4),
        ("gradient-caching", 1_024, 8e-4),
    ]


def test_a_part_of_a_plan_has_the_same_rates(minilm):
    plan = minilm.plan.FULL.part([512])
    assert [run.rate for run in minilm.plan.left(plan, [])] == [4e-4, 4e-4, 8e-4]
    with pytest.raises(SystemExit, match=r"--at-once is \[32\]: expected some of \[64, 512\]"):
        minilm.plan.FULL.part([32])


def test_two_devices_have_tables_of_their_own(minilm):
    rows = [
        row
        for machine in ("GPU A", "GPU B")
        for row in trained(minilm, minilm.plan.FULL, best=4e-4, machine=machine)[0]
    ]
    report = minilm.plan.report(rows)
    assert report.count("**GPU A, nl2bash, 64 pairs at once**: 30 seconds of training") == 1
    assert report.count("**GPU B, nl2bash, 512 pairs at once**") == 1
    assert report.count("| cache, 64 | 0.0004 | 3 | 100 | 300.0 | 0.688 (0.688 to 0.688) |") == 2
    words = "The cache over in-batch negatives, 64, the best on validation: 0.917, 0.917,"
    assert report.count(words) == 2
    figure = minilm.pictures.at_equal_device_time(rows)
    assert [axes.get_title() for axes in figure.axes] == [
        "64 pairs at once",
        "512 pairs at once",
    ]
    assert {axes.get_xlabel() for axes in figure.axes} == {"seconds of training, GPU B"}


def test_a_gpu_is_timed_by_its_events_a_step_late_and_not_in_evaluations(minilm, monkeypatch):
    now = [0.0]

    class Event:
        def __init__(self, *, enable_timing):
            assert enable_timing

        def record(self):
            self.time = now[0]

        def synchronize(self):
            pass

        def elapsed_time(self, later):
            return 1e3 * (later.time - self.time)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = minilm.training.Clock(torch.device("cuda"))
    seen = []
    for _ in range(2):
        clock.start()
        for _ in range(3):
            now[0] += 1.0
            clock.lap()
            seen.append(clock.seconds)
        clock.stop()
        now[0] += 100.0  # an evaluation
    assert seen == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert clock.seconds == 6.0


def test_padding_has_no_part_in_an_embedding(minilm, folder, tmp_path):
    _, pairs = minilm.data.pairs_of(folder)
    tokens = minilm.data.tokenizer_of(minilm.data.write_tiny_model(tmp_path, pairs), 12)
    model = AutoModel.from_pretrained(tmp_path).eval()
    encode = minilm.training.encoder(model, "float32")
    texts = ["find w1", "find w1 and v2 and v3"]
    together = encode(tokens(texts))
    for text, found in zip(texts, together, strict=True):
        ids = tokens([text])["input_ids"]
        states = model(ids[ids > 0][None]).last_hidden_state
        alone = torch.nn.functional.normalize(states.mean(dim=1), dim=1)[0]
        torch.testing.assert_close(found, alone, atol=1e-6, rtol=0)
    halved = minilm.training.encoder(model, "bfloat16")(tokens(texts))
    assert halved.dtype == torch.float32
    assert 0 < (halved - together).norm() < 0.05


def test_a_model_that_has_diverged_is_the_last(minilm, folder, tmp_path):
    _, pairs = minilm.data.pairs_of(folder)
    tokens = minilm.data.tokenizer_of(minilm.data.write_tiny_model(tmp_path, pairs), 12)
    data = minilm.data.tokenized(pairs, tokens)
    found = minilm.training.evaluate(
        lambda texts: torch.full((len(texts["input_ids"]), 4), torch.nan), data
    )
    worst = 1 / (len(data.items["input_ids"]) + 1)
    assert found == {"validation MRR": pytest.approx(worst), "test MRR": pytest.approx(worst)}
