"""How much to have in memory at a time."""

from typing import Any

from negcache_core.arrays._array import Array


def rows_at_a_time(rows: Array, numbers: int, dtype: Any, budget: int, xp: Any) -> int | None:
    """Return how many of `rows` (n, …) to work on at a time, or None for all of them.

    numbers: of `dtype`, that each row takes while it is worked on
    budget:  bytes for these

    All of them too where a trace leaves a size open: a chunk has a size that is known.

    >>> import numpy as np
    >>> rows_at_a_time(np.zeros(100), 50, np.float64, 8_000, np), rows_at_a_time(
    ...     np.zeros(20), 50, np.float64, 8_000, np
    ... )
    (20, None)
    """
    if rows.shape[0] is None:
        return None
    size = budget // (numbers * (8 if dtype == xp.float64 else 4))
    return None if rows.shape[0] <= size else max(1, size)
