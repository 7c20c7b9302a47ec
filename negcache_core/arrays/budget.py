"""How much to hold in memory at a time."""

from typing import Any

from negcache_core.arrays._array import Array
from negcache_core.arrays.backend import Backend


def itemsize(dtype: Any, xp: Any) -> int:
    """Return the size in bytes of a number in the dtype that scores are computed in."""
    return 8 if dtype == xp.float64 else 4


def budget_of(tile_bytes: int | None, array: Array, backend: Backend) -> int:
    """Return the bytes for scores in flight: `tile_bytes`, or None for what suits the device."""
    return backend.tile_bytes(array) if tile_bytes is None else tile_bytes


def rows_at_a_time(
    rows: int | None, numbers: int | None, dtype: Any, budget: int, xp: Any
) -> int | None:
    """Return how many rows to work on at a time, or None for all of them.

    rows:    how many there are, possibly 0
    numbers: of `dtype`, that each row needs while it is worked on. If either of these two is
             unknown while tracing, it is None, and all rows are worked on together
    budget:  bytes for these numbers

    >>> import numpy as np
    >>> rows_at_a_time(100, 50, np.float64, 8_000, np), rows_at_a_time(
    ...     20, 50, np.float64, 8_000, np
    ... )
    (20, None)
    """
    if not rows or not numbers:
        return None
    size = budget // (numbers * itemsize(dtype, xp))
    return None if rows <= size else max(1, size)
