"""Matching by sorting is matching pair by pair, on keys of any shape."""

import tracemalloc

import numpy as np
import pytest
from backends import BACKENDS, EAGER
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import seeds

from negcache_core import IsInCacheFilterFn, NegativeCache
from negcache_core.cache import matching

SHAPES = st.sampled_from([(), (1,), (3,), (2, 2), (0,)])
DTYPES = ("int64", "int32", "uint8", "uint16", "uint64", "bool")


def items(rng, count, shape, dtype):
    """Return few different items, with the ends of the dtype among them."""
    values = rng.integers(0, 3, (count, *shape)).astype(dtype)
    if dtype.startswith("uint"):
        values = np.where(values == 2, np.iinfo(dtype).max, values).astype(dtype)
    return values


@pytest.mark.parametrize("name", EAGER)
@settings(max_examples=40)
@given(
    seed=seeds,
    count=st.integers(0, 12),
    capacity=st.integers(1, 20),
    shape=SHAPES,
    dtype=st.sampled_from(DTYPES),
)
def test_sorting_finds_what_comparing_pairs_does(name, seed, count, capacity, shape, dtype):
    rng, backend = np.random.default_rng(seed), EAGER[name]
    xp = backend.module.CacheManager.backend.xp
    rows, table = (backend.to_native(items(rng, size, shape, dtype)) for size in (count, capacity))
    chosen = rng.random(count) < 0.7
    written, mask = backend.to_native(rng.random(capacity) < 0.7), backend.to_native(chosen)
    by_pairs, by_sorting = (
        backend.numpy(way(rows, table, written, xp))
        for way in (matching._first_by_pairs, matching._first_by_sorting)
    )
    np.testing.assert_array_equal(by_sorting[1], by_pairs[1])
    np.testing.assert_array_equal(by_sorting[0][by_sorting[1]], by_pairs[0][by_pairs[1]])
    by_pairs, by_sorting = (
        backend.to_numpy(way(rows, mask, xp=xp))
        for way in (matching.last_equal, matching._last_by_sorting)
    )
    np.testing.assert_array_equal(by_sorting[chosen], by_pairs[chosen])


@pytest.mark.parametrize("name", ["tf.function", "tf.function+xla", "jax.jit"])
@pytest.mark.parametrize("key", ["id", "tokens"])
def test_a_traced_batch_is_matched_by_sorting_too(name, key, monkeypatch):
    """Where no size is known, or too many rows are there: the same slots as NumPy's by pairs."""
    monkeypatch.setattr(matching, "FEW", 0)
    rng, backend = np.random.default_rng(5), BACKENDS[name]
    shape = () if key == "id" else (3,)
    rows, table = (items(rng, size, shape, "int32") for size in (7, 30))
    written, mask = rng.random(30) < 0.7, rng.random(7) < 0.7
    xp = backend.module.CacheManager.backend.xp

    def script(state, batch):
        table, written = state
        slots, found = matching.first_match(batch["rows"], table, written, xp=xp)
        return found, slots, matching.last_of_each(batch["rows"], batch["mask"], xp=xp)

    found, slots, last = backend.replay(script, (table, written), {"rows": rows, "mask": mask})
    expected, there = matching._first_by_pairs(
        rows, table, written, BACKENDS["numpy"].module.CacheManager.backend.xp
    )
    np.testing.assert_array_equal(found, there)
    np.testing.assert_array_equal(slots[found], expected[there])
    monkeypatch.undo()
    np.testing.assert_array_equal(last, matching.last_of_each(rows, mask))


def peak_of(function):
    """Return the most bytes that a call has allocated at a time."""
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("keys", [("id",), ("id", "tokens")])
def test_many_rows_take_memory_as_rows_and_slots_do_and_not_as_pairs(keys):
    """5,000 rows and 40,000 slots are 200 MB of pairs, each of one byte."""
    rng = np.random.default_rng(0)
    shapes = {"id": (), "tokens": (3,)}
    cache = NegativeCache(
        {key: rng.integers(0, 9**9, (40_000, *shape)) for key, shape in shapes.items()},
        np.zeros(40_000, np.int32),
    )
    batch = {key: rows[:5_000] for key, rows in cache.data.items()}
    passes = IsInCacheFilterFn(keys)
    assert peak_of(lambda: passes(cache, batch)) < 15e6
    assert not passes(cache, batch).any()
    rows = batch["id"]
    assert peak_of(lambda: matching.last_equal(rows, rows >= 0)) < 15e6


def test_few_rows_and_many_slots_take_no_more():
    """100 rows and 1,000,000 slots are 100 MB of pairs."""
    table = np.arange(1_000_000)
    rows, written = table[-100:], table >= 0
    assert peak_of(lambda: matching.first_match(rows, table, written)) < 75e6
