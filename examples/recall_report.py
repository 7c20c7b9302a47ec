"""The report of keras_rs_recommender.py: a table, and a plot of recall by epoch.

A run is a dict with "backend", "method", "rate", "seed", processor "seconds", and "curve", the
values of each metric by epoch.
"""

import statistics
from collections.abc import Iterable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

LOOKS = {
    "in-batch, KerasRS 0.4": ("#94a3b8", "x"),
    "in-batch": ("#334155", "o"),
    "hard negatives": ("#ea580c", "s"),
    "cache": ("#2563eb", "D"),
    "full softmax": ("#a855f7", "v"),
}

Row = dict[str, Any]


def best(rows: Iterable[Row]) -> Row:
    """Return the run with the best final recall@10 on validation users."""
    return max(rows, key=lambda row: row["curve"]["validation_recall@10"][-1])


def reported(rows: Iterable[Row]) -> list[Row]:
    """Return the runs of each backend and method at the rate that is best with the first seed."""
    found = []
    for runs in _together(rows).values():
        first = min(row["seed"] for row in runs)
        rate = best(row for row in runs if row["seed"] == first)["rate"]
        found += [row for row in runs if row["rate"] == rate]
    return found


def table(rows: Iterable[Row]) -> str:
    """Return a Markdown table with a row per backend and method: mean recall, median time."""
    lines = [
        "| backend | method | rate | seeds | recall@10 | recall@20 | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (backend, method), runs in _together(rows).items():
        at_10, at_20 = (
            _spread([run["curve"][f"test_recall@{k}"][-1] for run in runs]) for k in (10, 20)
        )
        seconds = statistics.median(run["seconds"] for run in runs)
        first = f"{backend} | {method} | {runs[0]['rate']:g} | {len(runs)}"
        lines.append(f"| {first} | {at_10} | {at_20} | {seconds:.0f} |")
    return "\n".join(lines)


def picture(rows: Iterable[Row]) -> Figure:
    """Return a panel per backend: recall@10 by epoch, as the mean and the range of the seeds."""
    found = _together(rows)
    backends = list(dict.fromkeys(backend for backend, _ in found))
    figure = Figure(figsize=(4.5 * len(backends), 3.6), layout="constrained")
    panels = figure.subplots(1, len(backends), sharey=True, squeeze=False)[0]
    for axes, backend in zip(panels, backends, strict=True):
        for method, look in LOOKS.items():
            if (backend, method) in found:
                _line(axes, found[backend, method], method, *look)
        axes.set_title(backend, loc="left")
        axes.set_xlabel("epochs")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(color="#cbd5e1", linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("test recall@10")
    panels[0].legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def _line(axes: Axes, runs: list[Row], method: str, color: str, marker: str) -> None:
    epochs = list(zip(*(run["curve"]["test_recall@10"] for run in runs), strict=True))
    where = range(1, len(epochs) + 1)
    axes.fill_between(
        where, list(map(min, epochs)), list(map(max, epochs)), color=color, alpha=0.2, linewidth=0
    )
    means = list(map(statistics.mean, epochs))
    axes.plot(where, means, color=color, marker=marker, markersize=4, linewidth=1.5, label=method)


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def _together(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["backend"], row["method"]), []).append(row)
    return found
