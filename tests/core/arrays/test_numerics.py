"""Sums of exponentials, soft-plus and sigmoid are accurate far out, in both tails."""

import numpy as np
import pytest
from backends import BACKENDS, EAGER
from hypothesis import given
from hypothesis import strategies as st

from negcache_core.arrays.numerics import log_sum_exp, sigmoid, soft_plus


@given(st.lists(st.floats(-1e4, 1e4) | st.just(-np.inf), min_size=1, max_size=40))
def test_log_sum_exp_is_the_naive_one_in_long_double(scores):
    ours = float(log_sum_exp(np.asarray(scores)))
    with np.errstate(divide="ignore"):
        naive = float(np.log(np.sum(np.exp(np.asarray(scores, np.longdouble)))))
    assert ours == pytest.approx(naive, rel=1e-13, abs=1e-13)


@pytest.mark.parametrize("name", [*EAGER, "jax"])
@pytest.mark.parametrize("axis", [0, 1])
def test_log_sum_exp_of_no_terms(name, axis):
    backend, shape = BACKENDS[name], (0, 2) if axis == 0 else (2, 0)
    xp = backend.module.CacheManager.backend.xp
    found = log_sum_exp(backend.to_native(np.zeros(shape, "float32")), axis, xp=xp)
    assert found.dtype == xp.float32
    np.testing.assert_array_equal(backend.numpy(found), [-np.inf, -np.inf])


@given(st.lists(st.floats(-1e4, 1e4), min_size=2, max_size=40), st.randoms())
def test_log_sum_exp_bounds_and_order(scores, random):
    """max <= log-sum-exp <= max + log n, whatever the order of the terms."""
    ours = float(log_sum_exp(np.asarray(scores)))
    shuffled = random.sample(scores, len(scores))
    assert ours == pytest.approx(float(log_sum_exp(np.asarray(shuffled))), rel=1e-14, abs=1e-12)
    slack = 1e-12 * max(1.0, abs(ours))
    assert max(scores) - slack <= ours <= max(scores) + np.log(len(scores)) + slack


@given(st.floats(-1e4, 1e4) | st.just(-np.inf))
def test_soft_plus_and_sigmoid_are_accurate_in_both_tails(value):
    exact = np.longdouble(value)
    given_plus, given_sigmoid = soft_plus(np.asarray(value)), sigmoid(np.asarray(value))
    assert float(given_plus) == pytest.approx(float(np.logaddexp(0, exact)), rel=1e-14, abs=0)
    if value > -700:  # beyond, 1 / (1 + exp(-value)) is below the smallest normal float64
        assert float(given_sigmoid) == pytest.approx(float(1 / (1 + np.exp(-exact))), rel=1e-13)
