"""Pictures of what training gains: test MRR by method, and the noise of gradients."""

import statistics
from collections.abc import Iterable
from typing import Any, NamedTuple

import _minilm_plan
import tournament.results
from _style import INK, LINES, OURS, THEIRS, plain, rows_of
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
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
    "gradient-caching": ("gradient caching", "#15803d", "s"),
    "memory": ("memory", THEIRS, "^"),
    "cache": ("cache", OURS, "D"),
    "full-softmax": ("full softmax", "#a855f7", "v"),
}
MINILM = tournament.results.KEPT.with_name("minilm.jsonl")
ON_A_DEVICE = tournament.results.KEPT.with_name("minilm_on_a_device.jsonl")
FIRST_PART = 1 / 8  # of the budget; what is before would squeeze the rest
ESTIMATORS = ("paper", "shared", "exact_query")


class Panel(NamedTuple):
    """What one panel of `results` shows.

    least: the smallest batch in-batch; smaller ones were not run at rates that suit them
    """

    title: str
    task: str
    towers: str
    least: int


PANELS = (
    Panel("MiniLM, shell commands", "minilm", "", 16),
    Panel("towers with a layer, docstrings", "docstrings", "deep", 256),
    Panel("word vectors, docstrings", "docstrings", "separate", 512),
)


def results() -> Figure | None:
    """Return a panel for each kind of towers: final test MRR by batch, each at its best rate."""
    kept = arenas(tournament.results.read(tournament.results.KEPT))
    shown = {(task, towers): rows for (task, towers, _), rows in kept.items()}
    shown["minilm", ""] = _minilm()
    if not all(shown.get((panel.task, panel.towers)) for panel in PANELS):
        return None
    figure = Figure(figsize=(9, 3.1), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        rows = [row for row in shown[panel.task, panel.towers] if not row["options"]]
        for method, above in (("in-batch", False), ("cache", True)):
            _, color, marker = METHODS[method]
            best = {
                batch: mrr
                for batch, mrr in _by_batch(row for row in rows if row["method"] == method).items()
                if method != "in-batch" or batch >= panel.least
            }
            label = "a cache" if method == "cache" else "in-batch negatives alone"
            axes.plot(list(best), list(best.values()), color=color, marker=marker, label=label)
            for batch, mrr in best.items():
                axes.annotate(
                    f"{mrr:.3f}",
                    (batch, mrr),
                    (0, 7 if above else -14),
                    textcoords="offset points",
                    ha="center",
                    color=color,
                    fontsize=8,
                )
        _batch_axis(axes, panel.title)
    every = figure.axes
    every[0].set_ylabel("MRR at the end")
    every[0].legend(frameon=False, loc="lower right")
    return figure


def _batch_axis(axes: Axes, title: str) -> None:
    """Scale alike everywhere: a twentieth more MRR is as high in each panel."""
    axes.set_title(title)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("batch, pairs")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.margins(x=0.15)
    values = [value for line in axes.lines for value in line.get_ydata()]
    middle = (min(values) + max(values)) / 2
    axes.set_ylim(0.92 * middle, 1.08 * middle)
    axes.yaxis.set_major_locator(MaxNLocator(4))
    plain(axes)


def _by_batch(rows: Iterable[Row]) -> dict[int, float]:
    """Return by batch the test MRR of the rate that is best on validation, mean of its seeds."""
    runs: dict[tuple[int, float], list[Row]] = {}
    for row in rows:
        runs.setdefault((row["batch"], row["rate"]), []).append(row)
    best: dict[int, list[Row]] = {}
    for (batch, _), found in sorted(runs.items()):
        if batch not in best or score(found[0]) > score(best[batch][0]):
            best[batch] = found
    return {
        batch: statistics.mean(row["curve"][-1]["test MRR"] for row in found)
        for batch, found in best.items()
    }


def _minilm() -> list[Row]:
    """Return MiniLM's results at the largest budget of encoder calls."""
    counted = [row for row in tournament.results.read_lines(MINILM) if row.get("calls")]
    largest = max((row["calls"] for row in counted), default=0)
    return [row for row in counted if row["calls"] == largest]


def minilm_on_a_device() -> Figure | None:
    """Return the kept comparison at equal time of a GPU."""
    rows = [row for row in tournament.results.read_lines(ON_A_DEVICE) if "curve" in row]
    return at_equal_device_time(rows) if rows else None


def at_equal_device_time(rows: list[Row]) -> Figure:
    """Return a panel for each number of pairs at once: test MRR by seconds of the last device.

    Of several batches of gradient caching, the one that is best on validation is drawn.
    """
    last = rows[-1]
    same = ("machine", "task", "precision")
    found = _minilm_plan.arenas(row for row in rows if all(row[key] == last[key] for key in same))
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    every = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for axes, (_, arena) in zip(every, sorted(found.items()), strict=True):
        best: dict[str, list[Row]] = {}
        for runs in _minilm_plan.shown(arena):
            method = runs[0]["method"]
            if method not in best or score(runs[0]) > score(best[method][0]):
                best[method] = runs
        for method, runs in best.items():
            title, color, marker = METHODS[method]
            _line(axes, runs, "seconds", color, marker, f"{title}, batch {runs[0]['batch']:,}")
        axes.set_xscale("linear")
        axes.set_xlim(left=0)
        axes.set_title(f"{arena[0]['at_once']:,} pairs at once")
        axes.set_xlabel(f"seconds of training, {last['machine']}")
        axes.legend(frameon=False, loc="lower right", fontsize=8)
        plain(axes)
    every[0].set_ylabel("test MRR")
    return figure


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
    """Return what represents a method: its defaults, or its best options if these were not run."""
    found = [row for row in choose(rows) if row["method"] == method]
    return max(found, key=lambda row: (not row["options"], score(row)), default=None)


def _line(axes: Axes, runs: list[Row], key: str, color: str, marker: str, label: str) -> None:
    """Draw the mean of all seeds, and a band from the lowest to the highest."""
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
    rows = list(tournament.results.read_lines(kept))
    return picture(reported(rows)) if rows else None


def _place(name: str) -> tuple[bool, bool, int]:
    """Return the position of an estimator: after the one that it is a variant of."""
    first = name.replace(",", "").split()[0]
    order = ("in-batch", "memory", *ESTIMATORS)
    return "corrected" in name, "draws" in name, order.index(first)


def _points(
    axes: Axes, rows: list[dict[str, Any]], key: str, names: list[str], color: str, label: str
) -> None:
    places = [names.index(row["estimator"]) for row in rows]
    axes.scatter([row[key] for row in rows], places, 26, color=color, label=label, zorder=3)
