"""What `make bench-training` trains: each method's grid with seed 0, then more seeds of the best.

The value of the cache's parts is measured on the tasks for choosing; the others only report.
"""

import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

from .choosing import Row, needed
from .tasks import TASKS
from .training import Run

CHOOSING = ("docstrings", "nl2bash")
BUDGETS = {"separate": 400_000, "deep": 200_000}  # encoder calls, by towers
RATES = (0.0045, 0.007, 0.01, 0.015, 0.02, 0.03)
MORE_SEEDS = (1, 2)


class Grid(NamedTuple):
    """Methods, batches and options whose product is trained, at each of RATES."""

    methods: tuple[str, ...]
    batches: tuple[int, ...]
    options: tuple[dict[str, Any], ...] = ({},)


EVERYWHERE = (
    Grid(("in-batch",), (128, 512, 1_024, 2_048)),
    Grid(("gradient-caching",), (1_024, 2_048)),
    Grid(("cache",), (64, 128, 256)),
)
TO_CHOOSE_BY = (
    Grid(
        ("cache",),
        (64, 128),
        (
            {"max_staleness": None},
            {"in_batch_negatives": False},
            {"estimator": "shared"},
            {"estimator": "paper"},
            {"num_samples": 2},
            {"prefill": True},
            {"refresh": 128},
            {"staleness_correction": True},
            {"drift": 1},
            {"scale": "trained"},
        ),
    ),
    Grid(("memory",), (64, 256)),
    Grid(("in-batch",), (512,), ({"scale": "trained"},)),
    Grid(("full-softmax",), (256,)),
)


def first_seed(tasks: Iterable[str] = tuple(TASKS)) -> list[Run]:
    """Return all runs of seed 0."""
    return [
        Run(task, towers, method, batch, rate, 0, BUDGETS[towers], options)
        for task in tasks
        for towers in (("separate", "deep") if task in CHOOSING else ("separate",))
        for grid in (*EVERYWHERE, *(TO_CHOOSE_BY if task in CHOOSING else ()))
        for method, batch, rate, options in itertools.product(
            grid.methods, grid.batches, RATES, grid.options
        )
    ]


def more_seeds(rows: Iterable[Row], tasks: Iterable[str] = tuple(TASKS)) -> list[Run]:
    """Return the runs of further seeds, for each setting that a report shows or compares with."""
    wanted = [row for row in needed(rows) if row["task"] in tasks]
    return [
        Run(**{**{key: row[key] for key in Run._fields}, "seed": seed})
        for row in wanted
        for seed in MORE_SEEDS
    ]
