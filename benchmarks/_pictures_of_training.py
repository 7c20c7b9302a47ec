"""Pictures of what training gains: towers by method, and the noise of gradients."""

import statistics
from typing import Any

from _methods import METHODS
from _style import INK, LINES, OURS, THEIRS, plain, rows_of
from matplotlib.axes import Axes
from matplotlib.figure import Figure

TASKS = {"docstrings": "docstring to Python function", "nl2bash": "request to shell command"}
ESTIMATORS = ("paper", "shared", "exact_query")
CEILING = "full softmax"


def training_quality() -> Figure | None:
    """Return a panel for each task: a line for each method, a point for each seed."""
    tasks = {task: rows_of(f"training_quality_{task}") for task in TASKS}
    tasks = {task: rows for task, rows in tasks.items() if rows}
    if not tasks:
        return None
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    every = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    for axes, (task, rows) in zip(every, tasks.items(), strict=True):
        for height, method in enumerate(METHODS):
            found = [row["MRR"] for row in rows if row["method"] == method]
            if found:
                ours = method.split(" + ")[0] in ESTIMATORS
                color = OURS if ours else THEIRS if method.startswith("memory") else INK
                axes.scatter(found, [height] * len(found), 14, color=color, alpha=0.5, linewidths=0)
                axes.scatter(statistics.mean(found), height, 200, color=color, marker="|")
                if method == CEILING:
                    axes.axvline(
                        statistics.mean(found), color=INK, linewidth=0.8, linestyle=(0, (4, 3))
                    )
        axes.set_title(TASKS[task])
        axes.set_xlabel("MRR of held-out queries")
        plain(axes)
    every[0].set_yticks(range(len(METHODS)), list(METHODS))
    every[0].invert_yaxis()
    return figure


def gradient_noise() -> Figure | None:
    """Return two panels, a line for each estimator: noise by batch size, and bias by staleness."""
    rows = rows_of("gradient_noise")
    if not rows:
        return None
    names = sorted({row["estimator"] for row in rows}, key=_place)
    lags = sorted({row["lag"] for row in rows})
    largest = max(row["rows"] for row in rows)
    colors = [color for color, _ in LINES.values()]
    figure = Figure(figsize=(9, 4.4), layout="constrained")
    noise, bias = figure.subplots(1, 2, sharey=True)
    for count, color in zip(sorted({row["rows"] for row in rows}), colors, strict=False):
        chosen = [row for row in rows if (row["rows"], row["lag"]) == (count, lags[len(lags) // 2])]
        _points(noise, chosen, "of batch", names, color, f"B = {count}")
    for lag, color in zip(lags, colors, strict=False):
        chosen = [row for row in rows if (row["rows"], row["lag"]) == (largest, lag)]
        label = f"{lag} steps, staleness {chosen[0]['staleness']:.2f}" if lag else "fresh"
        _points(bias, chosen, "bias", names, color, label)
    noise.set_title(f"noise of the draws, cache {lags[len(lags) // 2]} steps old")
    noise.set_xlabel("variance over that of the choice of the batch")
    bias.set_title(f"bias, B = {largest}")
    bias.set_xlabel("|E g - G| / |G|, G of the full softmax, fresh")
    for axes in (noise, bias):
        plain(axes)
        axes.legend(frameon=False)
        axes.set_xlim(left=-0.02)
    noise.set_yticks(range(len(names)), names)
    noise.invert_yaxis()
    return figure


def _place(name: str) -> tuple[bool, bool, int]:
    """Return where an estimator stands: after what it is a variant of."""
    first = name.replace(",", "").split()[0]
    order = ("in-batch", "memory", *ESTIMATORS)
    return "corrected" in name, "draws" in name, order.index(first)


def _points(
    axes: Axes, rows: list[dict[str, Any]], key: str, names: list[str], color: str, label: str
) -> None:
    places = [names.index(row["estimator"]) for row in rows]
    axes.scatter([row[key] for row in rows], places, 26, color=color, label=label, zorder=3)
