"""What a process holds over a long run: samples, and the line through them."""

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
    """Bytes a step by least squares, and the standard error of that."""

    bytes_per_step: float
    standard_error: float

    @property
    def too_steep(self) -> bool:
        """Whether memory grows beyond the bound, and not by chance."""
        return self.bytes_per_step - SURE * self.standard_error > BOUND

    def report(self) -> dict[str, Any]:
        """Return the figures, in bytes per 1,000 steps.

        conclusive: whether growth of twice the bound would have been seen
        """
        return {
            "bytes_per_1000_steps": round(1000 * self.bytes_per_step, 1),
            "standard_error": round(1000 * self.standard_error, 1),
            "bound": 1000.0 * BOUND,
            "conclusive": SURE * self.standard_error < BOUND,
            "flat": not self.too_steep,
        }


def resident_bytes() -> int:
    """Return the process's resident memory. Linux only."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def slope(samples: list[tuple[int, int]]) -> Slope:
    """Fit (step, bytes) after the warm-up third.

    Resident memory moves in jumps that last, so its residuals are alike for many samples: their
    number counts as n (1 - r) / (1 + r), r the correlation of neighbours.

    >>> slope([(step, 7 * step) for step in range(30)])
    Slope(bytes_per_step=7.0, standard_error=0.0)
    """
    every = np.asarray(samples, float)
    step, size = every[every[:, 0] >= WARM_UP * every[-1, 0]].T
    if len(step) < 4:
        return Slope(0.0, math.inf)  # too short a run to tell
    step = step - step.mean()
    found = float(step @ size / (step @ step))
    residual = size - size.mean() - found * step
    square = float(residual @ residual)
    if square <= 1e-12 * float(size @ size) * np.finfo(float).eps:
        return Slope(found, 0.0)
    alike = min(max(float(residual[1:] @ residual[:-1]) / square, 0.0), 0.99)
    count = max(len(step) * (1 - alike) / (1 + alike), 3.0)
    return Slope(found, math.sqrt(square / (count - 2) * len(step) / count / float(step @ step)))


def summary(samples: list[tuple[int, int]]) -> dict[str, Any]:
    """Return the figures of a run; resident_mb after each tenth of it."""
    tenths = [samples[max(len(samples) * part // 10 - 1, 0)][1] for part in range(1, 11)]
    return {"resident_mb": [round(size / 2**20, 1) for size in tenths], **slope(samples).report()}
