"""Which rows must not oppose a query: the quick ways find what a plain loop does."""

import numpy as np
import pytest
from backends import EAGER
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds

from negcache_core.arrays.exclusion import Exclusions, Labels

DTYPES = ["uint8", "int8", "int16", "int32", "int64"]
KINDS = {  # of integers: how they may be told apart by their last digits, or not
    "few": lambda rng, dtype, shape: rng.integers(0, 4, shape).astype(dtype),
    "any": lambda rng, dtype, shape: rng.integers(
        np.iinfo(dtype).min, np.iinfo(dtype).max, shape, dtype
    ),
    "alike": lambda rng, dtype, shape: (
        rng.integers(-5, 5, shape).astype(dtype) << (np.iinfo(dtype).bits - 5)
    ),
}


def plain(scores, rows, own):
    """Return the scores with -inf where a row must not oppose a query, one by one."""
    scores = scores.copy()
    for row, query in np.ndindex(scores.shape):
        hit = any(ids[row] in theirs[query] for ids, theirs in zip(rows.ids, own.ids, strict=True))
        hit = hit or (own.group is not None and rows.group[row] != own.group[query])
        hit = hit or (own.ceiling is not None and scores[row, query] > own.ceiling[query])
        scores[row, query] = -np.inf if hit else scores[row, query]
    return scores


def case(data, count):
    rng = np.random.default_rng(data.draw(seeds))
    queries = data.draw(st.sampled_from([0, 1, 5, 40]), label="queries")

    def integers(*shapes):
        kind = KINDS[data.draw(st.sampled_from(sorted(KINDS)))]
        dtype = np.dtype(data.draw(st.sampled_from(DTYPES)))
        return tuple(kind(rng, dtype, shape) for shape in shapes)

    keys = data.draw(st.integers(0, 2), label="keys")
    pairs = [integers(count, (queries, data.draw(st.integers(1, 3)))) for _ in range(keys)]
    group = integers(count, queries) if data.draw(st.booleans(), label="group") else (None, None)
    ceiling = rng.normal(1.0, 1.0, queries) if data.draw(st.booleans(), label="ceiling") else None
    rows = Labels(tuple(ids for ids, _ in pairs), group[0])
    own = Exclusions(tuple(theirs for _, theirs in pairs), group[1], ceiling)
    return rng.normal(size=(count, queries)), rows, own


@pytest.mark.parametrize("name", EAGER)
@given(data=st.data(), count=st.sampled_from([0, 1, 127, 128, 300]))
def test_every_backend_excludes_what_a_loop_does(name, data, count):
    scores, rows, own = case(data, count)
    expected, backend = plain(scores, rows, own), EAGER[name]
    verbs, native = backend.module.CacheManager.backend, backend.to_native
    given_own = Exclusions.of([None if e is None else native(e) for e in own.arrays()])
    given_own = Exclusions() if given_own is None else given_own
    found = verbs.exclude(native(scores), rows.each(native), given_own)
    np.testing.assert_array_equal(backend.to_numpy(found), expected)


@pytest.mark.parametrize("name", EAGER)
@given(data=st.data(), count=st.sampled_from([1, 5]))
def test_the_law_is_the_same_with_queries_first(name, data, count):
    scores, rows, own = case(data, count)
    backend = EAGER[name]
    native = backend.to_native
    given_own = Exclusions.of([None if e is None else native(e) for e in own.arrays()])
    if given_own is None:
        return
    first = rows.each(lambda each: native(each[None, :]))
    admitted = given_own.admit(first, native(np.ascontiguousarray(scores.T)))
    expected = np.isfinite(plain(scores, rows, own)).T
    shape = np.broadcast_shapes(np.shape(backend.to_numpy(admitted)), expected.shape)
    np.testing.assert_array_equal(
        np.broadcast_to(backend.to_numpy(admitted), shape), np.broadcast_to(expected, shape)
    )
