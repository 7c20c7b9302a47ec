"""Tests here share cases with those of the adapters, and programs with the benchmarks."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [
    str(ROOT / each) for each in ("benchmarks", "tests/adapters/torch", "tests/adapters/jax")
]
