"""The window: the ages at which rows may compete, as wide as the item tower's drift allows.

Its state is float32 (6,): the window, in update steps, and five sums over recently drawn rows, to
which a line is fitted: staleness against age. The line's height at age 0 is the staleness of a row
just embedded, such as dropout noise; the slope is what a step of training adds.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

from negcache_core.arrays._array import Array, cast
from negcache_core.cache.state import EMPTY

START = 4.0
"""Steps. At first the towers move fast, and older rows mislead more than they help."""

KEPT = 0.95
"""Of the sums, from one step to the next: the fit is to about the last twenty steps."""

PACE = 1.25
"""The most that the window grows or shrinks by in one step."""

LEAST, MOST = 1.0, 2.0**30
SPREAD = 1e-3
"""Relative variance of ages below which height and slope cannot be separated."""


def new_window(xp: Any) -> Array:
    """Return the state of a new cache."""
    state: Array = xp.asarray([START, 0.0, 0.0, 0.0, 0.0, 0.0])
    return cast(state, xp.float32, xp)


def window_over(ages: Iterable[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    """Return the state, on the host, in which all rows of the given ages compete at first.

    For rows from elsewhere that come without a window: it narrows if they turn out to be stale.
    """
    oldest = max(int(np.max(np.where(age == EMPTY, 0, age), initial=0)) for age in ages)
    return np.asarray([min(max(oldest, START), MOST), 0, 0, 0, 0, 0], np.float32)


def recent(age: Array, window: Array, xp: Any) -> Array:
    """Return ages (C,) with EMPTY for every row older than the window, which hides it."""
    return xp.where(age <= xp.astype(window[:1], age.dtype), age, EMPTY)


def drift_sums(ages: Array, staleness: Array, counted: Array, xp: Any) -> Array:
    """Return the sums (5,) of one step over drawn rows, from ages and staleness (n,).

    counted: bool (n,)

    Weights are 1 / steps: the spread of staleness is proportional to it, and it grows with the
    steps since a row was embedded.
    """
    steps = xp.astype(ages, staleness.dtype) + 1.0
    one = xp.zeros_like(steps) + 1.0
    terms = (1.0 / steps, one, steps, staleness / steps, staleness)
    columns = xp.concat([xp.where(counted, term, 0.0)[None, :] for term in terms], axis=0)
    sums: Array = xp.astype(xp.sum(columns, axis=1), xp.float32)
    return sums


def next_window(window: Array, found: Array, max_staleness: float, xp: Any) -> Array:
    """Return the state after a step whose `drift_sums` are `found`.

    The window moves to the age at which rows are expected to be `max_staleness` staler than one
    just embedded. If nothing was drawn it stays.

    >>> import numpy as np
    >>> found = drift_sums(np.arange(9), 0.02 * np.arange(9.0), np.ones(9, bool), np)
    >>> window = new_window(np)
    >>> for _ in range(9):
    ...     window = next_window(window, found, 0.3, np)
    >>> round(float(window[0]), 3)
    15.0
    """
    sums = KEPT * window[1:] + found
    inverse, count, steps, falling, stale = sums[0], sums[1], sums[2], sums[3], sums[4]
    spread = inverse * steps - count * count
    told = spread > SPREAD * inverse * steps
    slope = xp.where(
        told,
        (inverse * stale - count * falling) / xp.where(told, spread, 1.0),
        stale / xp.where(steps > 0.0, steps, 1.0),
    )
    now, rises = window[0], slope > 0.0
    wanted = xp.where(rises, max_staleness / xp.where(rises, slope, 1.0), MOST)
    wanted = xp.clip(wanted, LEAST, MOST)
    after = xp.maximum(xp.minimum(wanted, now * PACE), now / PACE)
    after = xp.where(found[1] > 0.0, after, now)
    return xp.concat([after[None], sums], axis=0)
