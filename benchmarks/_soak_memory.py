"""A process's memory over a long run: samples, and a line fitted to them."""

import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

BOUND = 64
"""Bytes by which memory may grow a step.

The smallest array that can stay behind is larger (NumPy's, of one number, is 112 bytes and the
number; tensors of the others take several times that), so not one may, at any step. A million steps
then add at most 64 MB, which no training run notices.
"""

WARM_UP = 1 / 3  # allocators, compilers and caches of functions fill first
SURE = 3  # standard errors by which a slope must pass the bound to be called too steep


class Slope(NamedTuple):
    """Bytes a step by least squares, and the standard error."""

    bytes_per_step: float
    standard_error: float

    @property
    def too_steep(self) -> bool:
        """Whether memory grows beyond the bound, and not by chance."""
        return self.bytes_per_step - SURE * self.standard_error > BOUND

    @property
    def conclusive(self) -> bool:
        """Whether growth of twice the bound would have been seen."""
        return SURE * self.standard_error < BOUND

    def report(self) -> list[float]:
        """Return the slope and its standard error, in bytes per 1,000 steps."""
        return [round(1000 * each, 1) for each in self]


UNKNOWN = Slope(0.0, math.inf)  # the run was too short


def resident_bytes() -> int:
    """Return the process's resident memory. Linux only."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def slope(samples: list[tuple[int, int]]) -> Slope:
    """Fit (step, bytes) after the warm-up third.

    Resident memory moves in lasting jumps, so residuals are correlated over many samples: their
    number counts as n (1 - r) / (1 + r), r the correlation of neighbours.

    >>> slope([(step, 7 * step) for step in range(30)])
    Slope(bytes_per_step=7.0, standard_error=0.0)
    """
    every = np.asarray(samples, float)
    step, size = every[every[:, 0] >= WARM_UP * every[-1, 0]].T
    if len(step) < 4:
        return UNKNOWN
    step = step - step.mean()
    found = float(step @ size / (step @ step))
    residual = size - size.mean() - found * step
    square = float(residual @ residual)
    if square <= 1e-12 * float(size @ size) * np.finfo(float).eps:
        return Slope(found, 0.0)
    alike = min(max(float(residual[1:] @ residual[:-1]) / square, 0.0), 0.99)
    count = max(len(step) * (1 - alike) / (1 + alike), 3.0)
    return Slope(found, math.sqrt(square / (count - 2) * len(step) / count / float(step @ step)))


def slope_of_handlers(samples: list[tuple[int, int]], turn: int) -> Slope:
    """Fit one slope, and a level for each handler, to the second halves of its `turn` steps.

    So what a new handler adds, in JAX its compiled programs, is not mistaken for growth with the
    steps. Handlers are independent but samples of one are not, so the error is by handler.

    >>> slope_of_handlers([(step, 7 * step + 99 * (step // 8)) for step in range(32)], 8)
    Slope(bytes_per_step=7.0, standard_error=0.0)
    """
    step, size = np.asarray(samples, float).T
    handler, place = step // turn, step % turn
    settled = (step >= WARM_UP * step[-1]) & (place >= turn / 2)
    parts = [settled & (handler == each) for each in np.unique(handler[settled])]
    parts = [part for part in parts if part.sum() > 1]
    if len(parts) < 2:
        return UNKNOWN
    centred = [(step[part] - step[part].mean(), size[part] - size[part].mean()) for part in parts]
    square = sum(float(steps @ steps) for steps, _ in centred)
    found = sum(float(steps @ sizes) for steps, sizes in centred) / square
    misses = [float(steps @ (sizes - found * steps)) for steps, sizes in centred]
    count = len(parts)
    return Slope(found, math.sqrt(sum(each**2 for each in misses) * count / (count - 1)) / square)


def summary(samples: list[tuple[int, int]], turn: int) -> dict[str, Any]:
    """Return the figures of a run in which each handler was used for `turn` steps.

    resident_mb: after each tenth of it
    """
    tenths = [samples[max(len(samples) * part // 10 - 1, 0)][1] for part in range(1, 11)]
    overall, in_handlers = slope(samples), slope_of_handlers(samples, turn)
    return {
        "resident_mb": [round(size / 2**20, 1) for size in tenths],
        "bytes_per_1000_steps": {"overall": overall.report(), "in_handlers": in_handlers.report()},
        "bound": 1000.0 * BOUND,
        "conclusive": {"overall": overall.conclusive, "in_handlers": in_handlers.conclusive},
        "flat": not (overall.too_steep or in_handlers.too_steep),
    }
