"""Claim: at small batch, a negative cache trains better towers than the batch's own negatives do.

Each method trains the demo's model on a real search task: the same first weights, batches and
settings, a few seeds. MRR and recall@10 of held-out queries among all items.

    python benchmarks/a_cache_trains_better_towers_than_a_batch.py docstrings
    python benchmarks/a_cache_trains_better_towers_than_a_batch.py nl2bash --data FOLDER
    python benchmarks/a_cache_trains_better_towers_than_a_batch.py docstrings --seeds 3 4
"""

import argparse
import multiprocessing
import os
import statistics
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from _harness import save, table
from _methods import METHODS
from _tasks import TASKS
from docstring_model import Data, Settings, train

CACHE_SIZES = {"docstrings": 8_192, "nl2bash": 4_096}  # about half of the items to train on
STEPS, BATCH_SIZE = 2_000, 16


def measure(task: str, name: str, seed: int, data: Data) -> dict[str, Any]:
    """Train once, and return the last figures."""
    make_loss, batches = METHODS[name]
    settings = Settings(STEPS, round(batches * BATCH_SIZE), CACHE_SIZES[task], seed)
    result = train(name, make_loss, settings, data)
    *_, mrr, recall = result.curve[-1]
    return {
        "task": task,
        "method": name,
        "seed": seed,
        "MRR": mrr,
        "recall@10": recall,
        "seconds": result.seconds,
    }


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return mean and spread over the seeds of each method."""
    found = []
    for method in METHODS:
        mine = [row for row in rows if row["method"] == method]
        if mine:
            mrr = [row["MRR"] for row in mine]
            found.append(
                {
                    "method": method,
                    "seeds": len(mine),
                    "MRR": statistics.mean(mrr),
                    "least": min(mrr),
                    "most": max(mrr),
                    "recall@10": statistics.mean(row["recall@10"] for row in mine),
                }
            )
    return found


def main() -> None:
    """Train each method with each seed, as many at once as there are cores."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", maxsplit=1)[0])
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--data", type=Path, help="folder of NL2Bash's train, dev and test.tsv")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args()
    if options.task == "nl2bash" and options.data is None:
        parser.error("nl2bash needs --data, the folder that holds its files")
    data = TASKS[options.task](options.data)
    fresh = multiprocessing.get_context("spawn")
    rows = []
    with ProcessPoolExecutor(options.jobs, mp_context=fresh) as pool:
        jobs = [
            pool.submit(measure, options.task, name, seed, data)
            for seed in options.seeds
            for name in options.methods
        ]
        for job in as_completed(jobs):
            rows.append(job.result())
            name = f"training_quality_{options.task}"
            path = save(name, rows[-1:], same=("task", "method", "seed"))
    print(table(summary(rows)))
    print("written to", path)


if __name__ == "__main__":
    main()
