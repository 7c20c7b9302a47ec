"""One training: towers on a task with a method, within a budget of encoder calls."""

import os
import statistics
import time
from collections.abc import Iterator
from fractions import Fraction
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from docstring_pairs import batches
from torch.optim.lr_scheduler import LambdaLR

from .method import Batch, Phase, Setting
from .methods import METHODS, OF_ALL, check_options
from .task import Task
from .towers import SCALE, TwoTowers, evaluate

CACHE_SIZES = {"docstrings": 8_192, "nl2bash": 8_192}
OTHER_CACHE_SIZE = 32_768
LAYERS_SHARE = 0.1  # share of the rate: layers take smaller steps than sparse tables
PARTS = [Fraction(part) for part in ("1/16", "1/8", "1/4", "3/8", "1/2", "3/4", "1")]


class Run(NamedTuple):
    """What identifies a run; `options` are the method's, and "scale" and "cache_size"."""

    task: str
    towers: str
    method: str
    batch: int
    rate: float
    seed: int
    budget: int
    options: dict[str, Any]


def train(run: Run, task: Task) -> dict[str, Any]:
    """Train once; return the run and its results.

    curve:   a dict at each of PARTS of the budget: "calls", processor "seconds" of the training
             steps, figures of both splits, and the mean over the steps since the last of what the
             method shows
    seconds: of the clock, with evaluation

    A seed sets initial weights and the order of pairs, whatever the method and batch. The rate is
    constant for half of the calls, then falls to zero.
    """
    # The steps are small: more threads barely help on an idle machine, and wait on a busy one.
    torch.set_num_threads(1)
    begun, load = time.perf_counter(), os.getloadavg()[0]
    torch.manual_seed(run.seed)
    own = {key: value for key, value in run.options.items() if key not in OF_ALL}
    check_options(run.method, own)
    model = TwoTowers(task, run.towers, run.options.get("scale", SCALE))
    size = run.options.get("cache_size", CACHE_SIZES.get(run.task, OTHER_CACHE_SIZE))
    training = METHODS[run.method](Setting(model, task, run.batch, size, run.seed, own))
    plan = [(phase, phase.steps(run.budget)) for phase in training.phases]
    if any(steps < 1 for _, steps in plan):
        raise SystemExit(f"{run}: the budget is less than one step of each phase.")
    before, after = _calls(plan)
    optimizers = [torch.optim.SparseAdam(model.tables(), lr=run.rate)]
    if model.log_scale.requires_grad:
        optimizers.append(torch.optim.Adam([model.log_scale], lr=run.rate))
    if model.layers():
        optimizers.append(torch.optim.Adam(model.layers(), lr=LAYERS_SHARE * run.rate))
    schedules = [
        LambdaLR(each, lambda step: min(1.0, 2.0 - 2.0 * before[step] / after[-1]))
        for each in optimizers
    ]
    stops = [1 + int(np.argmin(np.abs(after - float(part) * after[-1]))) for part in PARTS]
    curve: list[dict[str, float]] = []
    shown: list[dict[str, float]] = []
    seconds, step, pairs = 0.0, 0, _batches(task, len(after), run)
    for phase, steps in plan:
        used = time.process_time()
        phase.enter()
        seconds += time.process_time() - used
        for batch in islice(pairs, steps):
            step += 1
            used = time.process_time()
            loss = phase.loss(batch)
            for each in optimizers:
                each.zero_grad()
            loss.backward()
            for each in (*optimizers, *schedules):
                each.step()
            seconds += time.process_time() - used
            shown.append({"loss": loss.item(), **training.shown()})
            if step in stops:
                point = {
                    "calls": float(after[step - 1]),
                    "steps": step,
                    "seconds": seconds,
                    "scale": model.scale().item(),
                    **_means(shown),
                    **evaluate(model, task),
                }
                # Two parts of a short run may end at the same step.
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


def _calls(plan: list[tuple[Phase, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Return the encoder calls before each step, and one more for none left, and after each."""
    before, after, spent = [], [], 0.0
    for phase, steps in plan:
        begun = spent + phase.price
        before += [begun + step * phase.calls for step in range(steps)]
        after += [begun + step * phase.calls for step in range(1, steps + 1)]
        spent = after[-1]
    return np.asarray([*before, spent]), np.asarray(after)


def _means(shown: list[dict[str, float]]) -> dict[str, float]:
    """Return the mean of each figure over the steps that have it."""
    names = dict.fromkeys(name for figures in shown for name in figures)
    return {
        name: statistics.fmean(figures[name] for figures in shown if name in figures)
        for name in names
    }


def _batches(task: Task, steps: int, run: Run) -> Iterator[Batch]:
    queries, items = torch.from_numpy(task.queries), torch.from_numpy(task.items)
    item_of = torch.from_numpy(task.item_of)
    for rows in torch.from_numpy(batches(task.train, steps, run.batch, run.seed)):
        ids = item_of[rows]
        yield Batch(queries[rows], items[ids], ids)
