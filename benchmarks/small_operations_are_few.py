"""Claim: a step runs few Python calls, so small operations cost little next to the product.

At C = 16,384, D = 128 a bare product of queries and cache takes a millisecond or less, so what a
step does around its products matters. Python calls are counted by `sys.setprofile`: those in
negcache's own files, and all. Times are of a step and of the bare product, and, with --before, of
the same step in an earlier version, installed into a separate folder:

    pip install --no-deps --target /tmp/before git+file://$PWD@f8a8a6d
    python benchmarks/small_operations_are_few.py torch --before /tmp/before

Each version runs in its own process, and they take turns, round after round.
"""

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from _grid import VOCABULARY
from _harness import milliseconds, ratio, save, table

SLOTS, WIDTH, ROWS = 16_384, 128, (8, 64)
STEPS = 20  # a round, so that a turn is long compared with the message that starts it
OWN = re.compile(r"[/\\]negcache_(core|torch)[/\\]")
MOST_CALLS = 450
"""The target for a step of NumPy's and of PyTorch's, of calls in negcache's own files."""


class Worker:
    """A version of the library in its own process, which answers each line with one line."""

    def __init__(self, framework: str, rows: int, before: Path | None) -> None:
        paths = [] if before is None else [str(before.resolve())]
        self.process = subprocess.Popen(  # noqa: S603 - this file
            [sys.executable, __file__, framework, "--worker", str(rows)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, question: str) -> Any:
        """Return the answer to "calls", "step" or "product"."""
        print(question, file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        """End the process, and raise if it failed."""
        self.process.communicate()
        if self.process.returncode:
            raise SystemExit(self.process.returncode)


def answer(framework: str, rows: int) -> None:
    """Answer each line of the input: calls of a step, or seconds of a step or a product."""
    candidates = importlib.import_module(f"_steps_{framework}").Candidates(
        SLOTS, WIDTH, rows, VOCABULARY
    )
    runs = {"step": candidates.step(), "product": candidates.product()}
    for run in runs.values():
        run()
    for line in sys.stdin:
        question = line.strip()
        if question == "calls":
            print(json.dumps(calls(runs["step"])), flush=True)
        else:
            print(json.dumps(seconds(runs[question])), flush=True)


def calls(run: Callable[[], Any]) -> list[int]:
    """Return the number of Python calls in negcache's own files, and of all calls."""
    counts = [0, 0]

    def count(frame: FrameType, event: str, argument: Any) -> None:
        del argument
        if event == "call":
            counts[0] += OWN.search(frame.f_code.co_filename) is not None
            counts[1] += 1

    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(None)
    return counts


def seconds(run: Callable[[], Any]) -> float:
    """Return the mean time of one run of several."""
    start = time.perf_counter()
    for _ in range(STEPS):
        run()
    return (time.perf_counter() - start) / STEPS


def measured(framework: str, rows: int, before: Path | None, rounds: int) -> dict[str, Any]:
    """Return one row of the table."""
    workers = {"now": Worker(framework, rows, None)}
    if before is not None:
        workers["before"] = Worker(framework, rows, before)
    counted = {name: worker.ask("calls") for name, worker in workers.items()}
    times: dict[str, list[float]] = {name: [] for name in (*workers, "product")}
    for _ in range(rounds):
        times["product"].append(workers["now"].ask("product"))
        for name, worker in workers.items():
            times[name].append(worker.ask("step"))
    for worker in workers.values():
        worker.close()
    row = {
        "framework": framework,
        "queries": rows,
        "own calls": counted["now"][0],
        "all calls": counted["now"][1],
        "product ms": milliseconds(times, "product"),
        "step ms": milliseconds(times, "now"),
        "step / product": ratio(times, "now", "product"),
    }
    if before is not None:
        row["own calls before"], row["all calls before"] = counted["before"]
        row["step ms before"] = milliseconds(times, "before")
        row["now / before"] = ratio(times, "now", "before")
    return row


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("framework", choices=("numpy", "torch"))
    parser.add_argument("--before", type=Path, help="a folder with an earlier version installed")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        answer(options.framework, options.worker)
        return
    rows = [measured(options.framework, n, options.before, options.rounds) for n in ROWS]
    print(table(rows))
    save("small_operations", rows, same=("framework", "queries"))
    if max(row["own calls"] for row in rows) > MOST_CALLS:
        raise SystemExit(f"a step has more than {MOST_CALLS} calls of negcache's own")


if __name__ == "__main__":
    main()
