"""Claim: excluding rows that must not be a query's negatives costs at most a tenth of a step.

Steps with each option and without it take turns in one process. Reported is the median of the
ratios of processor time, on one thread, which other programs on the machine affect less.
Few rows have the id of anyone's positive, or score above the margin; each query competes with one
of four groups.

    export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
    python benchmarks/rows_left_out_cost_little.py torch
"""

import argparse
import importlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from _harness import save, table

WIDTH, SLOTS, ROWS, GROUPS = 128, (16_384, 131_072), (8, 64), 4
OPTIONS: dict[str, dict[str, Any]] = {
    "no option": {},
    "id_key": {"id_key": "item"},
    "two id_keys": {"id_keys": ("item", "query")},
    "group_key": {"group_key": "group"},
    "margin": {"margin": 0.05},
    "all": {"id_keys": ("item", "query"), "group_key": "group", "margin": 0.05},
}
Step = Callable[[], Any]


def steps(framework: str, slots: int, rows: int, estimator: str) -> dict[str, Step]:
    """Return a step for each set of options, each with its own full cache."""
    rng = np.random.default_rng(0)
    differentiates = framework == "torch"
    negcache = importlib.import_module("negcache_torch" if differentiates else "negcache_core")
    native = negcache.CacheManager.backend.to_array

    vectors = rng.standard_normal((2 * slots, WIDTH), np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    ids = rng.integers(0, 2 * slots, (2, slots + rows))
    group = rng.integers(0, GROUPS, slots + rows).astype(np.int32)
    every = {"item": ids[0], "query": ids[1], "group": group, "embedding": vectors[ids[0]]}
    features = {key: native(every[key][slots:].copy()) for key in ("item", "query", "group")}
    positive = native(vectors[ids[0, slots:]])
    query = positive + 0.05
    if differentiates:
        positive, query = (each.requires_grad_() for each in (positive, query))

    def made(options: dict[str, Any]) -> Step:
        specs = {
            key: negcache.FieldSpec(value.shape[1:], str(value.dtype))
            for key, value in every.items()
        }
        handler = negcache.CacheLossHandler(
            negcache.CacheManager(specs, slots),
            negcache.CacheClassificationLoss(
                "embedding", ("item",), scale=20.0, estimator=estimator, generator=0, **options
            ),
        )
        full = {key: native(value[:slots].copy()) for key, value in every.items()}
        handler.restore(negcache.NegativeCache(full, native(np.arange(slots, dtype=np.int32))))

        def network(given: Any) -> Any:
            if given is features:
                return positive
            drawn = native(vectors[np.asarray(given["item"])])
            return drawn.requires_grad_() if differentiates else drawn

        def step() -> None:
            loss = handler.update_cache_and_compute_loss(
                network, query, network(features), features
            )
            if differentiates:
                loss.backward()

        return step

    return {name: made(options) for name, options in OPTIONS.items()}


def measured(runs: dict[str, Step], seconds: float) -> dict[str, list[float]]:
    """Return the processor time of each step, round after round, in changing order."""
    names, times = list(runs), {name: [] for name in runs}
    for run in runs.values():
        run()
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds or len(times[names[0]]) < 5:
        for name in names:
            start = time.process_time()
            runs[name]()
            times[name].append(time.process_time() - start)
        names = names[1:] + names[:1]
    return times


def main() -> None:
    """Print and save a row for each size and estimator."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("framework", choices=("numpy", "torch"))
    parser.add_argument("--seconds", type=float, default=20.0, help="for each size and estimator")
    arguments = parser.parse_args()
    rows = []
    for slots in SLOTS:
        for queries in ROWS:
            for estimator in ("paper", "shared", "exact_query"):
                runs = steps(arguments.framework, slots, queries, estimator)
                times = measured(runs, arguments.seconds)
                plain = times["no option"]
                row = {"slots": slots, "queries": queries, "estimator": estimator}
                row["ms"] = 1e3 * statistics.median(plain)
                for name in list(OPTIONS)[1:]:
                    pairs = zip(times[name], plain, strict=True)
                    row[name] = statistics.median(mine / base for mine, base in pairs)
                rows.append(row)
                print(table(rows[-1:]), flush=True)
    print(save(f"rows_left_out_cost_little_{arguments.framework}", rows))


if __name__ == "__main__":
    main()
