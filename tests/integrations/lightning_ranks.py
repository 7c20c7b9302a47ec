"""Train the Lightning example on two processes, and again from the middle: python … FOLDER."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "examples"))

import lightning_search

SIZES = {"width": 16, "cache-size": 64, "batch-size": 6, "max-pairs": 300, "steps": 8}
SAVES = {"save-every": 4, "log-every": 2}


def arguments(out, **more):
    """Return a small run's command line."""
    options = {**SIZES, **SAVES, "out": out, **more}
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    half = folder / "whole" / "checkpoints" / "step=4.ckpt"
    lightning_search.main(arguments(folder / "whole", devices=2))
    lightning_search.main(arguments(folder / "resumed", devices=2, resume=half))
