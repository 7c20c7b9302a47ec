"""One training: towers on a task by a method, within a budget of encoder calls."""

import os
import time
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from docstring_pairs import batches
from torch.optim.lr_scheduler import LambdaLR

from .methods import CACHE_SIZES, METHODS, OF_ALL, OTHER_CACHE_SIZE, Batch, Setting
from .task import Task
from .towers import SCALE, TwoTowers, evaluate

PARTS = [Fraction(part) for part in ("1/16", "1/8", "1/4", "3/8", "1/2", "3/4", "1")]


class Run(NamedTuple):
    """What names a run; `options` are the method's, and "scale" and "cache_size"."""

    task: str
    towers: str
    method: str
    batch: int
    rate: float
    seed: int
    budget: int
    options: dict[str, Any]


def train(run: Run, task: Task) -> dict[str, Any]:
    """Train once; return the run and what it came to.

    curve:   a dict at each of PARTS of the budget: "calls", processor "seconds" of the training
             steps, figures of both splits, and the mean over the steps since the last of what the
             method shows
    seconds: of the clock, with evaluation

    The same first weights and order of pairs for a seed, whatever the method and batch. The rate is
    constant for half of the steps, then falls to zero.
    """
    # The steps are small: more threads hardly help on an idle machine, and wait on a busy one.
    torch.set_num_threads(1)
    begun, load = time.perf_counter(), os.getloadavg()[0]
    torch.manual_seed(run.seed)
    method = METHODS[run.method]
    own = {key: value for key, value in run.options.items() if key not in OF_ALL}
    if own and run.method != "cache":
        raise SystemExit(f"{run.method} takes no options but {OF_ALL}; it got {own}.")
    model = TwoTowers(task, run.towers, run.options.get("scale", SCALE))
    size = run.options.get("cache_size", CACHE_SIZES.get(run.task, OTHER_CACHE_SIZE))
    used = time.process_time()
    training = method.begin(Setting(model, task, size, run.seed, own))
    seconds = time.process_time() - used
    price = method.calls(run.batch, own)
    steps = int((run.budget - training.start) / price)
    if steps < 1:
        raise SystemExit(f"{run}: the budget is less than one step.")
    optimizers = [torch.optim.SparseAdam(model.tables(), lr=run.rate)]
    if model.log_scale.requires_grad:
        optimizers.append(torch.optim.Adam([model.log_scale], lr=run.rate))
    schedules = [
        LambdaLR(each, lambda step: min(1.0, 2.0 - 2.0 * step / steps)) for each in optimizers
    ]
    stops = [max(1, round(part * steps)) for part in PARTS]
    curve: list[dict[str, float]] = []
    shown: list[dict[str, float]] = []
    for step, batch in enumerate(_batches(task, steps, run), 1):
        used = time.process_time()
        loss = training.loss(batch)
        for each in optimizers:
            each.zero_grad()
        loss.backward()
        for each in (*optimizers, *schedules):
            each.step()
        seconds += time.process_time() - used
        shown.append({"loss": loss.item(), **training.shown()})
        if step in stops:
            point = {
                "calls": training.start + step * price,
                "steps": step,
                "seconds": seconds,
                "scale": model.scale().item(),
                **{key: sum(one[key] for one in shown) / len(shown) for key in shown[-1]},
                **evaluate(model, task),
            }
            # Two parts of a short run may end at one step.
            curve += [
                {"part": float(part), **point}
                for part, stop in zip(PARTS, stops, strict=True)
                if stop == step
            ]
            shown = []
    return {
        **run._asdict(),
        "cache_size": size,
        "curve": curve,
        "seconds": time.perf_counter() - begun,
        "load": load,
        "torch": torch.__version__,
    }


def _batches(task: Task, steps: int, run: Run) -> Iterator[Batch]:
    queries, items = torch.from_numpy(task.queries), torch.from_numpy(task.items)
    item_of = torch.from_numpy(task.item_of)
    for rows in torch.from_numpy(batches(task.train, steps, run.batch, run.seed)):
        ids = item_of[rows]
        yield Batch(queries[rows], items[ids], ids)
