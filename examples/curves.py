"""Plots for the examples: panels of lines on white, legible in dark mode too."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib import rc_context
from matplotlib.figure import Figure

INK, PALE = "#334155", "#cbd5e1"
COLORS = ("#2563eb", "#ea580c", "#16a34a", "#a855f7", "#64748b")
MARKERS = ("D", "s", "^", "o", "v")
_STYLE = {
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": PALE,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.hashsalt": "negcache",  # equal plots give equal files
}


class Panel(NamedTuple):
    """Lines (x, y) by name, and the panel's title, axis labels and horizontal levels by name."""

    title: str
    lines: Mapping[str, tuple[Iterable[float], Iterable[float]]]
    x: str = "training step"
    y: str = ""
    levels: Mapping[str, float] = {}


def draw(panels: Iterable[Panel], path: Path) -> None:
    """Save the panels as one picture, .svg or .png by the file's suffix."""
    panels = list(panels)
    with rc_context(_STYLE):
        figure = Figure(figsize=(9, 3.2), layout="constrained")
        for axes, panel in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
        ):
            _draw(axes, panel)
        path.parent.mkdir(parents=True, exist_ok=True)
        stamp = {"Date": None} if path.suffix == ".svg" else {}
        figure.savefig(path, dpi=110, metadata=stamp)


def _draw(axes: Any, panel: Panel) -> None:
    for (name, (x, y)), color, marker in zip(panel.lines.items(), COLORS, MARKERS, strict=False):
        marks = {"marker": marker, "markersize": 4} if len(list(x)) <= 20 else {}
        axes.plot(x, y, color=color, linewidth=1.5, label=name, **marks)
    for name, level in panel.levels.items():
        axes.axhline(level, color=INK, linewidth=1, linestyle="--", label=name)
    axes.set_title(panel.title, loc="left", fontsize=10)
    axes.set(xlabel=panel.x, ylabel=panel.y)
    axes.set_ylim(bottom=0)
    axes.grid(color=PALE, linewidth=0.5)
    axes.tick_params(length=0)
    axes.spines[["top", "right"]].set_visible(b=False)
    if len(panel.lines) + len(panel.levels) > 1:
        axes.legend(frameon=False, fontsize=8)
