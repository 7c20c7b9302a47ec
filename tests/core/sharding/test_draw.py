"""Draws over shards: first a shard, then in it, by the law of one draw over all."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds

from negcache_core import NegativeCache
from negcache_core.arrays._array import numpy_namespace
from negcache_core.retrieval.softmax_draw import inverse_cdf
from negcache_core.sharding.draw import _pick
from negcache_core.testing import NUMPY_ADAPTER


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


def entropy_of_rank(adapter, rank):
    """Return what a rank is told of its queries when all 10 rows of two shards score alike."""
    loss = adapter.module.DistributedCacheClassificationLoss("embedding", ("x",), generator=0)
    slots = (6, 4)[rank]
    cache = NegativeCache(
        {"x": np.zeros((slots, 1)), "embedding": np.zeros((slots, 2))}, np.zeros(slots, np.int32)
    )
    queries = np.ones((3 + rank, 2))
    out = loss(lambda features: np.zeros((len(features["x"]), 2)), queries, queries, cache)
    return {name: np.asarray(value) for name, value in out.metrics.items()}


def test_all_slots_of_all_shards_compete():
    for metrics in NUMPY_ADAPTER.replicas(2, entropy_of_rank):
        np.testing.assert_allclose(metrics["effective_negatives"], 10.0, rtol=1e-12)
        assert metrics["fill"] == 1.0
