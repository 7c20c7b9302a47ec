"""Many runs, one after another or some at a time; what is there already is not run again."""

import multiprocessing
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from pathlib import Path
from typing import Any

from . import results
from .task import Task
from .tasks import TASKS
from .training import Run, train


def run_all(runs: Iterable[Run], path: Path, folder: Path | None, jobs: int) -> None:
    """Train each run that has no result in `path`, and add its result.

    folder: NL2Bash's
    jobs:   processes, each with a thread
    """
    done = {results.name_of(row) for row in results.read(path)}
    wanted = list({results.name_of(run): run for run in runs}.items())
    left = [run for name, run in wanted if name not in done]
    print(f"{len(wanted)} runs, {len(left)} of them to do", flush=True)
    if jobs == 1:
        for place, run in enumerate(left, 1):
            _say(_run(run, path, folder), place, len(left))
        return
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=fresh) as pool:
        waiting = [pool.submit(_run, run, path, folder) for run in left]
        for place, job in enumerate(as_completed(waiting), 1):
            _say(job.result(), place, len(left))


def _run(run: Run, path: Path, folder: Path | None) -> dict[str, Any]:
    # Another process may have done it since.
    for row in results.read(path):
        if results.name_of(row) == results.name_of(run):
            return row
    result = train(run, _task(run.task, folder))
    results.add(path, result)
    return result


@cache
def _task(name: str, folder: Path | None) -> Task:
    return TASKS[name](folder)


def _say(row: dict[str, Any], place: int, total: int) -> None:
    last = row["curve"][-1]
    print(
        f"{place}/{total} {row['task']} {row['towers']} {row['method']} batch {row['batch']} "
        f"rate {row['rate']:g} seed {row['seed']} budget {row['budget']:,} {row['options']}: "
        f"validation {last['validation MRR']:.4f}, test {last['test MRR']:.4f}; "
        f"{last['seconds']:.0f} s of training, {row['seconds']:.0f} s in all",
        flush=True,
    )
