"""Pictures of a step on a GPU: its time over that of the bare bfloat16 product, and its memory."""

from collections import Counter
from collections.abc import Callable
from typing import Any

from _device_jobs import KEPT, read
from _style import INK, OURS, PALE, THEIRS, TIMES, plain
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

Record = dict[str, Any]
Size = tuple[int, int, int]
GREEN = "#15803d"
# The dtype of the rows, whether kernels are fused, and how it is drawn.
SERIES: dict[tuple[str, bool], dict[str, Any]] = {
    ("float32", False): {"color": THEIRS, "marker": "s", "label": "float32 rows"},
    ("bfloat16", False): {"color": OURS, "marker": "o", "label": "bfloat16 rows"},
    ("int8", False): {"color": GREEN, "marker": "^", "label": "int8 rows"},
    ("float32", True): {"color": THEIRS, "marker": "s", "label": "float32, fused", "ls": "--"},
    ("bfloat16", True): {"color": OURS, "marker": "o", "label": "bfloat16, fused", "ls": "--"},
    ("int8", True): {"color": GREEN, "marker": "^", "label": "int8, fused", "ls": "--"},
}


def step_time(framework: str) -> Callable[[], Figure | None]:
    """Return what draws a step's time over the product's: a panel for each capacity and width."""

    def draw() -> Figure | None:
        records = _of_one_device(framework)
        products = _figures(records, "ms", what="product", storage="bfloat16")
        mode = "graph" if framework == "torch" else "jit"
        lines = [
            (style, _over(_steps(records, "ms", mode, *kind), products))
            for kind, style in SERIES.items()
        ]
        eager = _over(_steps(records, "ms", "eager", "float32", fused=False), products)
        grey = {"color": INK, "linestyle": ":", "linewidth": 1}
        lines.append(({**grey, "label": "float32 rows, eager code"}, eager))
        bound = _figures(records, "ms", what="read", storage="bfloat16")
        pale = {"color": PALE, "linewidth": 3, "zorder": 0}
        lines.append(({**pale, "label": "reading bfloat16 rows once"}, _over(bound, products)))
        how = "CUDA graph" if framework == "torch" else "jax.jit"
        return _panels(
            records,
            lines,
            f"time of a step ({how}) over that of the bare bfloat16 product",
            level=1.0,
        )

    return draw


def step_memory() -> Figure | None:
    """Return the memory of a step in PyTorch beyond the tables, in the same panels."""
    records = _of_one_device("torch")
    lines = [(style, _steps(records, "MB", "eager", *kind)) for kind, style in SERIES.items()]
    sizes = {size for _, figures in lines for size in figures}
    matrix = {(slots, width, rows): 4e-6 * slots * rows for slots, width, rows in sizes}
    lines.append(({"color": INK, "linestyle": ":", "label": f"score matrix, B {TIMES} C"}, matrix))
    return _panels(records, lines, "MB of a step beyond the tables (eager code)")


def _of_one_device(framework: str) -> list[Record]:
    """Return the figures of the device that has most of them."""
    records = [each for each in read(KEPT) if each["framework"] == framework and "ms" in each]
    counted = Counter(each["device"] for each in records)
    return [each for each in records if each["device"] == counted.most_common(1)[0][0]]


def _figures(records: list[Record], figure: str, **facts: Any) -> dict[Size, float]:
    return {
        (each["slots"], each["width"], each["rows"]): each[figure]
        for each in records
        if each.get(figure) is not None and all(each[key] == facts[key] for key in facts)
    }


def _steps(
    records: list[Record], figure: str, mode: str, storage: str, fused: bool
) -> dict[Size, float]:
    facts = {"what": "step", "loss": "exact_query", "mode": mode}
    return _figures(records, figure, **facts, storage=storage, fused=fused)


def _over(figures: dict[Size, float], base: dict[Size, float]) -> dict[Size, float]:
    return {size: value / base[size] for size, value in figures.items() if size in base}


def _panels(
    records: list[Record],
    lines: list[tuple[dict[str, Any], dict[Size, float]]],
    title: str,
    level: float | None = None,
) -> Figure | None:
    """Draw lines over the number of queries: a column for each capacity, a row for each width."""
    sizes = {size for _, figures in lines for size in figures}
    if not sizes:
        return None
    slots, widths, rows = (sorted({size[axis] for size in sizes}) for axis in range(3))
    shape = (2.5 * len(slots) + 2.4, 2.1 * len(widths) + 1.0)
    figure = Figure(figsize=shape, layout="constrained")
    every = figure.subplots(len(widths), len(slots), sharex=True, sharey=True, squeeze=False)
    for across, width in zip(every, widths, strict=True):
        for axes, capacity in zip(across, slots, strict=True):
            if level is not None:
                axes.axhline(level, color=INK, linewidth=1)
            for style, figures in lines:
                place = [
                    (b, figures[capacity, width, b])
                    for b in rows
                    if (capacity, width, b) in figures
                ]
                axes.plot(*(zip(*place, strict=True) if place else ([], [])), markersize=4, **style)
            axes.set_title(f"C = {capacity:,}, D = {width}", size=9)
            _scales(axes, rows)
    figure.supxlabel("queries B", size=9)
    figure.suptitle(f"{title}\n{records[0]['device']}, {records[0]['version']}", size=10)
    handles, labels = every[0][0].get_legend_handles_labels()
    drawn = [bool(figures) for _, figures in lines]
    kept = [
        pair for pair, there in zip(zip(handles, labels, strict=True), drawn, strict=True) if there
    ]
    figure.legend(*zip(*kept, strict=True), loc="outside right center", frameon=False)
    return figure


def _scales(axes: Axes, rows: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(rows))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    plain(axes)
