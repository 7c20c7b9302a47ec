"""Question: at equal encoder calls, which way of training makes the best towers.

Each method trains the same towers from the same first weights on the same pairs, at batches and
rates from one grid. A text that goes through a tower and is learned from is one encoder call, one
that is only embedded a third. Batch and rate are chosen by validation queries; MRR of others is
reported, all items being the gallery.

    python benchmarks/training_at_equal_encoder_calls.py run --tasks docstrings \
        --methods in-batch cache --batches 64 512 --rates 0.001 0.003 --budget 200000
    python benchmarks/training_at_equal_encoder_calls.py run --runs FILE --processes 16
    python benchmarks/training_at_equal_encoder_calls.py choose
    python benchmarks/training_at_equal_encoder_calls.py plan --tasks docstrings
    python benchmarks/training_at_equal_encoder_calls.py keep
    python benchmarks/training_at_equal_encoder_calls.py report
"""

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

from _harness import RESULTS, table
from tournament import plan, results
from tournament.choosing import all_seeds, choose, needed
from tournament.methods import METHODS
from tournament.report import report
from tournament.running import Places, run_all
from tournament.tasks import TASKS
from tournament.towers import TOWERS
from tournament.training import Run


def run(options: argparse.Namespace) -> None:
    """Train the runs of a file, or the product of all that was asked for."""
    grid = [options.methods, options.batches, options.rates]
    if options.runs is not None:
        if any(grid):
            raise SystemExit("--runs has methods, batches and rates of its own: leave them out.")
        run_all(results.read_runs(options.runs), *_where(options))
        return
    if not all(grid):
        raise SystemExit("expected --methods, --batches and --rates, or --runs.")
    runs = itertools.starmap(
        Run,
        itertools.product(
            options.tasks,
            options.towers,
            options.methods,
            options.batches,
            options.rates,
            options.seeds,
            options.budget,
            options.options,
        ),
    )
    run_all(runs, *_where(options))


def run_plan(options: argparse.Namespace) -> None:
    """Train the default plan, and what it chooses with further seeds."""
    tasks = options.tasks or [name for name in TASKS if name != "nl2bash" or options.nl2bash]
    begun = time.monotonic()
    run_all(plan.first_seed(tasks), *_where(options))
    if options.stop_after is not None:
        options.stop_after -= time.monotonic() - begun
    run_all(plan.more_seeds(results.read(options.out), tasks), *_where(options))


def _where(options: argparse.Namespace) -> tuple[Places, int, float | None]:
    places = Places(options.out, options.nl2bash, options.tasks_cache)
    return places, options.processes, options.stop_after


def keep(options: argparse.Namespace) -> None:
    """Add what a report needs to what is kept; of other runs of seed 0, the last point alone."""
    settled, found = (
        {results.name_of(row): row for row in results.read(*paths)}
        for paths in ([options.to], options.out)
    )
    rows = list((settled | found).values())
    whole = {results.name_of(each) for row in needed(rows) for each in all_seeds(rows, row)}
    kept = [
        row if name in whole else settled.get(name, {**row, "curve": row["curve"][-1:]})
        for name, row in (settled | found).items()
        if row["seed"] == 0 or name in whole or name in settled
    ]
    results.write(options.to, kept)
    print(f"{len(kept)} runs, {len(whole)} of them whole, written to {options.to}")


def print_report(options: argparse.Namespace) -> None:
    """Print a table for each task, in Markdown."""
    print(report(results.read(*options.out)) or "There is no run of seed 0.")


def print_choice(options: argparse.Namespace) -> None:
    """Print the chosen batch and rate of each contest."""
    rows = [_line(row) for row in choose(results.read(*options.out))]
    print(table(rows) if rows else "There is no run of seed 0.")


def _line(row: dict[str, Any]) -> dict[str, Any]:
    last = row["curve"][-1]
    kept = {key: row[key] for key in ("task", "towers", "method", "budget", "batch", "rate")}
    kept["options"] = json.dumps(row["options"])
    return {**kept, "validation": last["validation MRR"], "test": last["test MRR"]}


def main() -> None:
    """Run, or show, the tournament."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", maxsplit=1)[0])
    parts = parser.add_subparsers(required=True)
    train = parts.add_parser("run", help="train what is missing of a grid")
    train.set_defaults(do=run)
    train.add_argument("--towers", nargs="+", choices=TOWERS, default=["separate"])
    train.add_argument("--methods", nargs="+", choices=METHODS)
    train.add_argument("--batches", nargs="+", type=int)
    train.add_argument("--rates", nargs="+", type=float)
    train.add_argument("--seeds", nargs="+", type=int, default=[0])
    train.add_argument("--budget", nargs="+", type=int, default=[200_000], help="encoder calls")
    train.add_argument(
        "--options",
        nargs="+",
        type=json.loads,
        default=[{}],
        help="of the method, as JSON; each a contest of its own",
    )
    train.add_argument(
        "--runs", type=Path, help="file of runs, each a line of JSON, in place of a grid"
    )
    train.add_argument("--tasks", nargs="+", choices=TASKS, default=["docstrings"])
    planned = parts.add_parser("plan", help="train what is left of the default plan")
    planned.set_defaults(do=run_plan)
    planned.add_argument("--tasks", nargs="+", choices=TASKS, help="all, where the data are")
    out = RESULTS / "tournament.jsonl"
    for part in (train, planned):
        part.add_argument(
            *("--processes", "--jobs"), type=int, default=1, help="runs at a time, each a thread"
        )
        part.add_argument(
            "--stop-after", type=float, metavar="SECONDS", help="start no run after this time"
        )
        part.add_argument("--tasks-cache", type=Path, help="folder that keeps the tasks' arrays")
        part.add_argument("--nl2bash", type=Path, help="folder of NL2Bash's three files")
        part.add_argument("--out", type=Path, default=out, help="file of results")
    chosen = parts.add_parser("choose", help="print the best batch and rate of each")
    chosen.set_defaults(do=print_choice)
    kept = parts.add_parser("keep", help="copy what a report needs to the tracked files")
    kept.set_defaults(do=keep)
    kept.add_argument("--to", type=Path, default=results.KEPT)
    for part in (chosen, kept):
        part.add_argument("--out", nargs="+", type=Path, default=[out], help="files of results")
    shown = parts.add_parser("report", help="print test figures of the chosen runs")
    shown.set_defaults(do=print_report)
    shown.add_argument("--out", nargs="+", type=Path, default=[results.KEPT])
    options = parser.parse_args()
    options.do(options)


if __name__ == "__main__":
    main()
