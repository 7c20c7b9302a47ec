"""Draw what a training did, the same way in every example."""

from collections.abc import Mapping
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

COLOURS = ("#334155", "#2563eb", "#ea580c", "#16a34a")
STYLE = {"font.size": 9, "svg.hashsalt": "negcache", "axes.titlesize": 11}


def save_curves(
    path: Path, curves: Mapping[str, Mapping[int, float]], *, title: str, along: str, value: str
) -> None:
    """Save a picture of curves, {name: {step: figure}}, in the format that the path ends with."""
    with rc_context(STYLE):
        figure = Figure(figsize=(6, 3.4), layout="constrained")
        axes = figure.subplots()
        for (name, curve), colour in zip(curves.items(), COLOURS, strict=False):
            steps, figures = list(curve), list(curve.values())
            axes.plot(steps, figures, color=colour, marker="o", markersize=3.5, label=name)
        axes.set(title=title, xlabel=along, ylabel=value)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(b=False)
        axes.legend(frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else {})
    print(f"Saved {path}")
