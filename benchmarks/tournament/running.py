"""Many runs, one after another or several at a time; existing results are not run again."""

import multiprocessing
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from . import results
from .keeping import kept
from .task import Task
from .tasks import TASKS
from .training import Run, train


class Places(NamedTuple):
    """Where results go, and where tasks come from.

    results: a file, a line of JSON for each run
    nl2bash: the folder of NL2Bash's three files
    tasks:   a folder that keeps each task as NAME.npz; None: each process makes its own, except
             the two that `more_tasks` keeps
    """

    results: Path
    nl2bash: Path | None = None
    tasks: Path | None = None


def run_all(
    runs: Iterable[Run], places: Places, processes: int = 1, stop_after: float | None = None
) -> None:
    """Train each run that has no result, and add its result.

    processes:  runs at a time, one thread each
    stop_after: seconds from now after which no run starts; None: all start
    """
    end = None if stop_after is None else time.time() + stop_after
    done = {results.name_of(row) for row in results.read(places.results)}
    wanted = list({results.name_of(run): run for run in runs}.items())
    left = [run for name, run in wanted if name not in done]
    print(f"{len(wanted)} runs, {len(left)} of them to do", flush=True)
    if processes == 1:
        rows = [_say(_run(run, places, end), place, len(left)) for place, run in enumerate(left, 1)]
    else:
        fresh = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, mp_context=fresh) as pool:
            waiting = [pool.submit(_run, run, places, end) for run in left]
            rows = [
                _say(job.result(), place, len(left))
                for place, job in enumerate(as_completed(waiting), 1)
            ]
    if None in rows:
        print(f"time is up: {rows.count(None)} runs were not begun", flush=True)


def _run(run: Run, places: Places, end: float | None) -> dict[str, Any] | None:
    """Return a run's result; None if it is too late to start."""
    if end is not None and time.time() >= end:
        return None
    # Another process may have done it meanwhile.
    for row in results.read(places.results):
        if results.name_of(row) == results.name_of(run):
            return row
    result = train(run, _task(run.task, places.nl2bash, places.tasks))
    results.add(places.results, result)
    return result


@cache
def _task(name: str, nl2bash: Path | None, folder: Path | None) -> Task:
    if folder is None:
        return TASKS[name](nl2bash)
    return kept(folder / f"{name}.npz", lambda: TASKS[name](nl2bash))


def _say(row: dict[str, Any] | None, place: int, total: int) -> dict[str, Any] | None:
    if row is None:
        return None
    last = row["curve"][-1]
    print(
        f"{place}/{total} {row['task']} {row['towers']} {row['method']} batch {row['batch']} "
        f"rate {row['rate']:g} seed {row['seed']} budget {row['budget']:,} {row['options']}: "
        f"validation {last['validation MRR']:.4f}, test {last['test MRR']:.4f}; "
        f"{last['seconds']:.0f} s of training, {row['seconds']:.0f} s in all",
        flush=True,
    )
    return row
