"""Pictures of time and memory."""

from typing import Any

from _grid import FRAMEWORKS
from _style import INK, LINES, OURS, PALE, THEIRS, TIMES, TITLES, plain, rows_of
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator


def step_cost() -> Figure | None:
    """Return a panel for each framework: one line of the picture is one size."""
    rows = {
        framework: {
            (row["slots"], row["width"], row["rows"]): row
            for row in rows_of(f"step_cost_{framework}")
        }
        for framework in FRAMEWORKS
    }
    measured = [framework for framework in FRAMEWORKS if rows[framework]]
    sizes = sorted({size for framework in measured for size in rows[framework]})
    if not sizes:
        return None
    places, place = {}, 0.0
    for number, size in enumerate(sizes):
        # A gap between capacities, a smaller one between widths.
        before = sizes[number - 1]
        place += 1 + 0.9 * (size[0] != before[0]) + 0.4 * (size[1] != before[1]) if number else 0
        places[size] = place
    figure = Figure(figsize=(2.1 * len(measured) + 2.2, 0.24 * place + 1.9), layout="constrained")
    every = figure.subplots(1, len(measured), sharex=True, sharey=True, squeeze=False)[0]
    for axes, framework in zip(every, measured, strict=True):
        _panel(axes, TITLES[framework], rows[framework], places)
    every[0].set_yticks(
        list(places.values()), [f"{slots:,} {TIMES} {width}, B = {b}" for slots, width, b in places]
    )
    every[0].set_ylim(place + 0.8, -0.8)
    figure.supylabel(f"slots C {TIMES} width D, queries B", size=9)
    figure.supxlabel("time over that of the bare product q @ cache.T (less is better)", size=9)
    figure.legend(
        *every[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False
    )
    return figure


def _panel(
    axes: Axes, title: str, rows: dict[Any, dict[str, Any]], places: dict[Any, float]
) -> None:
    """Draw one framework: two points for each size, and a line between them."""
    heights = [places[size] for size in rows]
    ours = [row["step / product"] for row in rows.values()]
    theirs = [row["published / product"] for row in rows.values()]
    axes.axvline(1, color=INK, linewidth=1, linestyle=(0, (4, 3)), label="the bare product")
    axes.hlines(heights, ours, theirs, color=PALE, linewidth=2, zorder=1)
    axes.scatter(ours, heights, 30, color=OURS, zorder=3, label="step")
    axes.scatter(
        theirs,
        heights,
        26,
        color="white",
        marker="s",
        edgecolors=THEIRS,
        label="published algorithm",
        zorder=2,
    )
    axes.set_title(title)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(axis="x", color=PALE, linewidth=0.5)
    axes.tick_params(length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def memory() -> Figure | None:
    """Return one line for each framework, and the score matrix's."""
    rows = rows_of("memory")
    if not rows:
        return None
    # One picture shows one width and one number of queries: those measured most.
    kinds = [(row["width"], row["rows"]) for row in rows]
    width, queries = max(kinds, key=kinds.count)
    rows = [row for row in rows if (row["width"], row["rows"]) == (width, queries)]
    figure = Figure(figsize=(7.4, 3.9), layout="constrained")
    axes = figure.subplots()
    matrix = sorted({(row["slots"], row["score matrix MB"]) for row in rows})
    axes.plot(
        *zip(*matrix, strict=True), color=INK, linestyle="--", label=f"score matrix, B {TIMES} C"
    )
    for framework, (color, marker) in LINES.items():
        points = sorted(
            (row["slots"], row["larger MB"])
            for row in rows
            if row["framework"] == framework and row["larger MB"] is not None
        )
        if points:
            style = {"color": color, "marker": marker, "markersize": 5}
            axes.plot(*zip(*points, strict=True), **style, label=TITLES[framework])
    axes.axhline(64, color=INK, linewidth=1, linestyle=":", label="64 MB, the promise")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator([slots for slots, _ in matrix]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("slots C")
    axes.set_ylabel("MB beyond the tables")
    axes.set_title(f"Memory of one step, B = {queries}, D = {width}")
    plain(axes)
    figure.legend(loc="outside right center", frameon=False)
    return figure
