"""Claim: at equal encoder calls a negative cache never trains worse towers than a batch alone.

Each method trains the same towers from the same first weights on the same pairs, at batches and
rates from one grid. A text that goes through a tower and is learned from is one encoder call, one
that is only embedded a third. Batch and rate are chosen by validation queries; MRR of others is
reported, all items being the gallery.

    python benchmarks/a_cache_never_trains_worse_than_a_batch.py run --tasks docstrings \
        --methods in-batch cache --batches 64 512 --rates 0.001 0.003 --budget 200000
    python benchmarks/a_cache_never_trains_worse_than_a_batch.py choose
"""

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

from _harness import RESULTS, table
from tournament import results
from tournament.choosing import choose
from tournament.methods import METHODS
from tournament.running import run_all
from tournament.tasks import TASKS
from tournament.towers import TOWERS
from tournament.training import Run


def run(options: argparse.Namespace) -> None:
    """Train the product of all that was asked for."""
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
    run_all(runs, options.out, options.nl2bash, options.jobs)


def print_choice(options: argparse.Namespace) -> None:
    """Print the chosen batch and rate of each contest."""
    rows = [_line(row) for row in choose(results.read(options.out))]
    print(table(rows) if rows else f"{options.out} has no run of seed 0.")


def _line(row: dict[str, Any]) -> dict[str, Any]:
    last = row["curve"][-1]
    kept = {key: row[key] for key in ("task", "towers", "method", "budget", "batch", "rate")}
    kept["options"] = json.dumps(row["options"])
    return {**kept, "validation": last["validation MRR"], "test": last["test MRR"]}


def main() -> None:
    """Run, or show, the tournament."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", maxsplit=1)[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "tournament.jsonl")
    parts = parser.add_subparsers(required=True)
    train = parts.add_parser("run", help="train whatever of a grid is not there yet")
    train.set_defaults(do=run)
    train.add_argument("--tasks", nargs="+", choices=TASKS, default=["docstrings"])
    train.add_argument("--towers", nargs="+", choices=TOWERS, default=["separate"])
    train.add_argument("--methods", nargs="+", choices=METHODS, required=True)
    train.add_argument("--batches", nargs="+", type=int, required=True)
    train.add_argument("--rates", nargs="+", type=float, required=True)
    train.add_argument("--seeds", nargs="+", type=int, default=[0])
    train.add_argument("--budget", nargs="+", type=int, default=[200_000], help="encoder calls")
    train.add_argument(
        "--options",
        nargs="+",
        type=json.loads,
        default=[{}],
        help="of the method, as JSON; each a contest of its own",
    )
    train.add_argument("--jobs", type=int, default=1, help="runs at a time")
    train.add_argument("--nl2bash", type=Path, help="folder of NL2Bash's train, dev and test.tsv")
    chosen = parts.add_parser("choose", help="print the best batch and rate of each")
    chosen.set_defaults(do=print_choice)
    for part in parts.choices.values():
        part.add_argument("--out", type=Path, default=argparse.SUPPRESS, help="file of results")
    options = parser.parse_args()
    options.do(options)


if __name__ == "__main__":
    main()
