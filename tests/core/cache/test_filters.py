"""The filter against a plain loop over slots, on every backend."""

from unittest import mock

import numpy as np
import pytest
from backends import EAGER
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds

from negcache_core import EMPTY
from negcache_core.cache import matching

SHAPES = {"scalar": (), "vector": (2,), "matrix": (2, 1), "flag": (), "nothing": (0,)}


@pytest.mark.parametrize("name", EAGER)
@given(
    seed=seeds,
    slots=st.integers(1, 6),
    rows=st.integers(0, 5),
    keys=st.lists(st.sampled_from(sorted(SHAPES)), min_size=1, unique=True),
    few=st.sampled_from([0, matching.FEW]),  # by sorting, or pair by pair
)
def test_true_means_that_no_written_row_equals_it_on_all_keys(name, seed, slots, rows, keys, few):
    backend, rng = EAGER[name], np.random.default_rng(seed)

    def some(count):
        return {
            key: rng.integers(0, 2, (count, *shape)).astype(bool if key == "flag" else np.int32)
            for key, shape in SHAPES.items()
        }

    age = np.where(rng.random(slots) < 0.4, EMPTY, 3).astype(np.int32)
    data, items = some(slots), some(rows)
    for table in data.values():
        table[age == EMPTY] = 0  # as a manager leaves them: an item of zeros must not be found
    expected = [
        not any(
            age[slot] != EMPTY and all((data[key][slot] == items[key][row]).all() for key in keys)
            for slot in range(slots)
        )
        for row in range(rows)
    ]
    with mock.patch.object(matching, "FEW", few):
        mask = backend.module.IsInCacheFilterFn(keys)(
            backend.native(backend.module.NegativeCache(data, age)), backend.native(items)
        )
    np.testing.assert_array_equal(backend.to_numpy(mask), np.asarray(expected, bool))
