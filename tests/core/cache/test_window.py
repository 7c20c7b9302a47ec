"""The window of ages goes to where the drift says, whatever noise lies under it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from negcache_core.cache.state import EMPTY
from negcache_core.cache.window import (
    LEAST,
    MOST,
    PACE,
    START,
    drift_sums,
    new_window,
    next_window,
    recent,
)

numbers = st.floats(1e-4, 0.1)


def after(steps, sums, limit, window=None):
    window = new_window(np) if window is None else window
    for _ in range(steps):
        window = next_window(window, sums, limit, np)
    return window


def sums_of(ages, staleness, counted=None):
    ages = np.asarray(ages)
    counted = np.ones(len(ages), bool) if counted is None else counted
    return drift_sums(ages, np.asarray(staleness, np.float64), counted, np)


@given(slope=numbers, noise=st.floats(0.0, 0.5), limit=st.floats(0.05, 0.5))
def test_it_goes_to_the_age_at_which_drift_alone_is_the_limit(slope, noise, limit):
    """Dropout's noise, which a row of any age has, does not narrow it."""
    ages = np.arange(40)
    window = after(60, sums_of(ages, noise + slope * ages), limit)
    assert window[0] == pytest.approx(max(limit / slope, LEAST), rel=0.02)


@given(slope=numbers)
def test_ages_that_are_all_alike_tell_the_slope_as_well(slope):
    """As after a prefill: the staleness of a row just embedded is then taken for 0."""
    ages = np.full(16, 99)
    window = after(60, sums_of(ages, slope * (ages + 1)), 0.2)
    assert window[0] == pytest.approx(max(0.2 / slope, LEAST), rel=0.02)


def test_a_prefilled_cache_stays_while_its_tower_moves_slowly():
    """Its rows grow older together, a step at a time; the window must not fall behind them."""
    window = new_window(np)
    for step in range(300):
        assert window[0] >= step
        window = next_window(window, sums_of(np.full(16, step), np.full(16, 1e-4 * step)), 0.2, np)


def test_it_follows_a_tower_that_speeds_up_or_stops():
    slow, fast = (sums_of(np.arange(20), rate * np.arange(20)) for rate in (0.002, 0.02))
    window = after(100, slow, 0.2)
    assert window[0] == pytest.approx(100, rel=0.02)
    window = after(100, fast, 0.2, window)
    assert window[0] == pytest.approx(10, rel=0.02)
    still = sums_of(np.arange(20), np.zeros(20))
    assert after(1000, still, 0.2, window)[0] == MOST


def test_it_does_not_widen_where_every_old_row_is_as_far_off_as_can_be():
    """Staleness ends at 2: old rows alone would show no slope."""
    ages = np.arange(0, 1000, 9)
    sums = sums_of(ages, np.minimum(0.04 * ages, 2.0))
    window = after(5, sums, 0.2, np.asarray([1000.0, 0, 0, 0, 0, 0], np.float32))
    assert window[0] < 500


@given(
    ages=st.lists(st.integers(0, EMPTY - 1), min_size=1, max_size=9),
    staleness=st.floats(0.0, 1e6),
    limit=st.floats(1e-6, 1e6),
    start=st.floats(LEAST, MOST),
)
def test_a_step_changes_it_by_its_pace_at_most_and_keeps_it_in_bounds(
    ages, staleness, limit, start
):
    before = new_window(np)
    before[0] = start
    window = next_window(before, sums_of(ages, np.full(len(ages), staleness)), limit, np)
    assert window.dtype == np.float32
    assert np.isfinite(window).all()
    assert LEAST <= window[0] <= MOST
    assert window[0] >= before[0] / PACE * (1 - 1e-6)
    assert window[0] <= before[0] * PACE * (1 + 1e-6)


def test_a_step_that_drew_nothing_leaves_it():
    sums = sums_of(np.arange(8), 0.01 * np.arange(8))
    window = after(3, sums, 0.2)
    nothing = sums_of(np.arange(8), np.full(8, 9.0), counted=np.zeros(8, bool))
    assert next_window(window, nothing, 0.2, np)[0] == window[0]
    assert next_window(new_window(np), nothing, 0.2, np)[0] == START


def test_rows_older_than_it_are_not_there():
    ages = np.asarray([0, 4, 5, EMPTY, EMPTY - 1], np.int32)
    found = recent(ages, new_window(np), np)
    np.testing.assert_array_equal(found, [0, 4, EMPTY, EMPTY, EMPTY])
    assert found.dtype == np.int32
    wide = np.asarray([MOST, 0, 0, 0, 0, 0], np.float32)
    np.testing.assert_array_equal(recent(ages[:4], wide, np), ages[:4])
