"""Pictures of what training gains: test MRR by method, and the noise of gradients."""

import json
import statistics
from typing import Any

import tournament.results
from _style import INK, LINES, OURS, THEIRS, plain, rows_of
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from recall_report import picture, reported
from tournament.choosing import Row, all_seeds, arenas, choose, score

TASKS = {
    "docstrings": "docstring to Python function",
    "nl2bash": "request to shell command",
    "lines": "three lines of code to the next",
    "recommender": "names that a function uses to one more",
}
METHODS = {
    "in-batch": ("in-batch", INK, "o"),
    "gradient-caching": ("gradient caching", "#16a34a", "s"),
    "memory": ("memory", THEIRS, "^"),
    "cache": ("cache", OURS, "D"),
    "full-softmax": ("full softmax", "#a855f7", "v"),
}
FIRST_PART = 1 / 8  # of the budget; what is before would squeeze the rest
ESTIMATORS = ("paper", "shared", "exact_query")


def training_quality() -> Figure | None:
    """Return two panels for each task, by encoder calls and by time: a line for each method."""
    shown: dict[tuple[str, str], list[Row]] = {}
    # Of several budgets, the largest: they are in order.
    for (task, towers, _), rows in arenas(tournament.results.read(tournament.results.KEPT)).items():
        shown[task, towers] = rows
    if not shown:
        return None
    figure = Figure(figsize=(9, 0.4 + 3 * len(shown)), layout="constrained")
    every = figure.subplots(len(shown), 2, sharey="row", squeeze=False)
    for pair, ((task, towers), rows) in zip(every, shown.items(), strict=True):
        for method, (title, color, marker) in METHODS.items():
            runs = all_seeds(rows, chosen) if (chosen := _shown(rows, method)) else []
            if runs:
                label = f"{title}, batch {runs[0]['batch']:,}"
                for axes, key in zip(pair, ("calls", "seconds"), strict=True):
                    _line(axes, runs, key, color, marker, label)
        pair[0].set_title(f"{TASKS.get(task, task)}, {towers} towers", loc="left")
        pair[0].set_ylabel("test MRR")
        pair[0].legend(frameon=False, loc="lower right", fontsize=8)
        for axes in pair:
            plain(axes)
    every[-1][0].set_xlabel("encoder calls")
    every[-1][1].set_xlabel("processor seconds of training")
    return figure


def _shown(rows: list[Row], method: str) -> Row | None:
    """Return what a method is shown by: its defaults, or its best options if these were not run."""
    found = [row for row in choose(rows) if row["method"] == method]
    return max(found, key=lambda row: (not row["options"], score(row)), default=None)


def _line(axes: Axes, runs: list[Row], key: str, color: str, marker: str, label: str) -> None:
    """Draw the mean of all seeds, and a band from the least to the most."""
    kept = ([point for point in row["curve"] if point["part"] >= FIRST_PART] for row in runs)
    points = list(zip(*kept, strict=True))
    where = [statistics.mean(point[key] for point in part) for part in points]
    found = [[point["test MRR"] for point in part] for part in points]
    axes.fill_between(
        where,
        [min(each) for each in found],
        [max(each) for each in found],
        color=color,
        alpha=0.2,
        linewidth=0,
    )
    means = [statistics.mean(each) for each in found]
    axes.plot(where, means, color=color, marker=marker, markersize=4, linewidth=1.5, label=label)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(_short))
    axes.xaxis.set_minor_locator(NullLocator())


def _short(value: float, _: int | None = None) -> str:
    thousands = value / 1_000
    return f"{thousands:g}k" if thousands >= 1 else f"{value:g}"


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


def keras_rs_recall() -> Figure | None:
    """Return a panel for each backend: recall@10 by epoch of KerasRS's negatives and of a cache."""
    kept = tournament.results.KEPT.with_name("keras_rs.jsonl")
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    return picture(reported(rows)) if rows else None


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
