"""Draws over shards: first a shard, then in it, by the law of one draw over all."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds

from negcache_core.arrays._array import numpy_namespace
from negcache_core.retrieval.softmax_draw import inverse_cdf
from negcache_core.sharding.draw import _pick


@given(seed=seeds, shards=st.integers(1, 4), blocks=st.integers(1, 5))
def test_a_shard_and_then_its_block_are_what_one_draw_of_all_blocks_is(seed, shards, blocks):
    rng = np.random.default_rng(seed)
    scores, uniforms = rng.normal(size=(2, shards, blocks)), rng.random((2, 7))
    scores[rng.random(scores.shape) < 0.3] = -np.inf
    scores[:, 0, 0] = 0.0
    with np.errstate(divide="ignore"):  # of shards without any weight
        weights = np.log(np.exp(scores).sum(axis=2))
    shard, rest = _pick(weights, uniforms, xp=numpy_namespace)
    inside = scores[[[0], [1]], shard].reshape(-1, blocks)
    block = inverse_cdf(inside, rest.reshape(-1, 1)).reshape(shard.shape)
    whole = inverse_cdf(scores.reshape(2, -1), uniforms)
    np.testing.assert_array_equal(shard * blocks + block, whole)
