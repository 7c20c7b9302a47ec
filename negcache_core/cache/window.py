"""The window: the ages at which rows may compete, as wide as the item tower's drift allows.

Its state is float32 (6,): the window, in update steps, and five sums over the rows drawn lately, to
which a line is fitted: staleness against age. What a row just embedded has of it, such as dropout's
noise, is the line's height at age 0; the slope is what a step of training adds.
"""

from typing import Any

from negcache_core.arrays._array import Array, cast
from negcache_core.cache.state import EMPTY

START = 4.0
"""Steps. At first the towers move fast, and older rows mislead more than they tell."""

KEPT = 0.95
"""Of the sums, from one step to the next: the fit is to about the last twenty steps."""

PACE = 1.25
"""The most that the window grows or shrinks by in one step."""

LEAST, MOST = 1.0, 2.0**30
SPREAD = 1e-3
"""Relative variance of ages below which no height can be told from the slope."""


def new_window(xp: Any) -> Array:
    """Return the state of a new cache."""
    state: Array = xp.asarray([START, 0.0, 0.0, 0.0, 0.0, 0.0])
    return cast(state, xp.float32, xp)


def recent(age: Array, window: Array, xp: Any) -> Array:
    """Return ages (C,) with EMPTY for every row that is older than the window: it is not there."""
    return xp.where(age <= cast(window[0], age.dtype, xp), age, EMPTY)


def drift_sums(ages: Array, staleness: Array, counted: Array, xp: Any) -> Array:
    """Return the sums (5,) of one step over drawn rows, from ages and staleness (n,).

    counted: bool (n,)

    Weights are 1 / steps: staleness varies as much as it is large, and grows with the steps since a
    row was embedded.
    """
    steps = cast(ages, staleness.dtype, xp) + 1.0
    one = xp.zeros_like(steps) + 1.0
    terms = (1.0 / steps, one, steps, staleness / steps, staleness)
    columns = xp.concat([xp.where(counted, term, 0.0)[None, :] for term in terms], axis=0)
    return cast(xp.sum(columns, axis=1), xp.float32, xp)


def next_window(window: Array, found: Array, max_staleness: float, xp: Any) -> Array:
    """Return the state after a step in which `drift_sums` was `found`.

    The window goes to the age at which rows are expected to be `max_staleness` staler than one just
    embedded. Where nothing was drawn it stays.

    >>> import numpy as np
    >>> found = drift_sums(np.arange(9), 0.02 * np.arange(9.0), np.ones(9, bool), np)
    >>> window = new_window(np)
    >>> for _ in range(9):
    ...     window = next_window(window, found, 0.3, np)
    >>> round(float(window[0]), 3)
    15.0
    """
    sums = KEPT * window[1:] + found
    inverse, count, steps, falling, stale = (sums[place] for place in range(5))
    spread = inverse * steps - count * count
    told = spread > SPREAD * inverse * steps
    slope = xp.where(
        told,
        (inverse * stale - count * falling) / xp.where(told, spread, 1.0),
        stale / xp.where(steps > 0.0, steps, 1.0),
    )
    now, rises = window[0], slope > 0.0
    wanted = xp.where(rises, max_staleness / xp.where(rises, slope, 1.0), MOST)
    # Not xp.clip, which takes plain numbers only in some libraries.
    after = xp.maximum(xp.minimum(wanted, now * PACE), now / PACE)
    after = xp.minimum(xp.maximum(after, xp.zeros_like(now) + LEAST), xp.zeros_like(now) + MOST)
    after = xp.where(found[1] > 0.0, after, now)
    return xp.concat([after[None], sums], axis=0)
