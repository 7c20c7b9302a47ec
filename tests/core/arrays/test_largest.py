import numpy as np
import pytest
from backends import EAGER
from hypothesis import given, settings
from hypothesis import strategies as st

from negcache_core.arrays._array import GROUP, largest


@pytest.mark.parametrize("name", EAGER)
@settings(max_examples=15)  # each has hundreds of ties
@given(data=st.data())
def test_the_largest_come_in_order_and_ties_go_to_the_lowest_position(name, data):
    """Also where whole groups of values are left out of the search, and the last one is short."""
    backend = EAGER[name]
    size = data.draw(st.integers(6 * GROUP, 9 * GROUP))
    count = data.draw(st.integers(1, 3))  # few enough that groups are searched
    kinds = data.draw(st.integers(1, 40))  # many values are equal
    seed = data.draw(st.integers(0, 2**32 - 1))
    values = np.random.default_rng(seed).integers(0, kinds, size).astype(np.int32)
    values[data.draw(st.integers(0, size - 1))] = kinds
    xp = backend.module.CacheManager.backend.xp
    found = largest(backend.to_native(values), count, xp)
    expected = np.argsort(-values, kind="stable")[:count]
    np.testing.assert_array_equal(backend.to_numpy(found), expected)
