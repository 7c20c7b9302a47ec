"""How the pictures of the documentation look, and where their figures come from."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _harness import RESULTS
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure

TITLES = {"numpy": "NumPy", "torch": "PyTorch", "tensorflow": "TensorFlow", "jax": "JAX"}
TIMES = "\N{MULTIPLICATION SIGN}"
OURS, THEIRS, INK, PALE = "#2563eb", "#ea580c", "#334155", "#cbd5e1"
LINES = {
    "numpy": ("#15803d", "o"),
    "torch": ("#ea580c", "s"),
    "tensorflow": ("#a16207", "^"),
    "jax": ("#2563eb", "D"),
}
# White behind dark ink, legible on light and dark pages; one file from one set of results.
STYLE = {
    "font.size": 9,
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "axes.edgecolor": PALE,
    "axes.labelcolor": INK,
    "axes.titlesize": 11,
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.hashsalt": "negcache",
}


def rows_of(name: str) -> list[dict[str, Any]]:
    """Return the rows of one file of results; none where it is missing."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text())["rows"] if path.exists() else []


def draw(make: Callable[[], Figure | None], path: Path) -> bool:
    """Make a picture and write it, without the date; return whether there was one."""
    rcParams.update(STYLE)
    figure = make()
    if figure is None:
        return False
    stamp = {"Date": None} if path.suffix == ".svg" else {}
    figure.savefig(path, dpi=110, metadata=stamp)
    return True


def plain(axes: Axes) -> None:
    """Take away what is no figure."""
    axes.grid(color=PALE, linewidth=0.5)
    axes.tick_params(length=0)
    axes.spines[["top", "right"]].set_visible(False)
