"""Streaming retrieval against the whole score matrix: one law for any tiling, and no matrix."""

import itertools
import tracemalloc

import negcache_torch
import numpy as np
import pytest
import torch
from backends import EAGER
from hypothesis import given
from hypothesis import strategies as st
from laws import chi_square_is_plausible, naive_slot
from strategies import seeds

from negcache_core import EMPTY, CacheClassificationLoss, NegativeCache
from negcache_core.arrays.backend import NUMPY
from negcache_core.retrieval.scorer import Scorer
from negcache_core.retrieval.softmax_draw import draw_from_caches
from negcache_core.retrieval.tiled_scores import BLOCK, CacheScores
from negcache_core.retrieval.top_k import (
    approximate_top_k_with_indices,
    best_of_all_groups,
    group_runs,
)

capacities = st.lists(st.integers(1, 3 * BLOCK), min_size=1, max_size=3)
tiles = st.sampled_from([BLOCK, 2 * BLOCK, 3 * BLOCK, 100 * BLOCK])


def caches_of(seed, capacities, tile, *, rows=2, width=3, backend=NUMPY, native=np.asarray):
    """Return streamed caches, and the matrix of all their scores."""
    rng = np.random.default_rng(seed)
    queries = 1.5 * rng.standard_normal((rows, width))
    scorer = Scorer(None, None, backend.xp.float64, backend.xp)
    caches, matrix, first = [], [], 0
    for capacity in capacities:
        table = rng.standard_normal((capacity, width))
        age = np.where(rng.random(capacity) < 0.3, EMPTY, 1).astype(np.int32)
        arrays = (native(array) for array in (queries, table, age))
        caches.append(CacheScores(*arrays, first, tile, scorer, backend))
        matrix.append(np.where(age == EMPTY, -np.inf, queries @ table.T))
        first += capacity
    return caches, np.concatenate(matrix, axis=1)


def stream_of(matrix, capacities):
    """Return each row of the matrix as the blocks it is drawn by: whole ones, then a short one."""
    starts = np.cumsum([0, *capacities])
    return [
        (start + at, matrix[:, start + at : min(start + at + BLOCK, stop)])
        for start, stop in itertools.pairwise(starts)
        for at in range(0, stop - start, BLOCK)
    ]


@given(seed=seeds, capacities=capacities, tile=tiles)
def test_log_partition_is_the_naive_one_for_any_tiling(seed, capacities, tile):
    caches, matrix = caches_of(seed, capacities, tile)
    drawn = draw_from_caches(caches, np.full((2, 1, 2), 0.5))
    with np.errstate(divide="ignore"):
        naive = np.log(np.exp(matrix).sum(axis=1))
    np.testing.assert_allclose(drawn.log_partition, naive, rtol=1e-12, atol=1e-12)


@given(seed=seeds, capacities=capacities, tile=tiles, draws=st.integers(1, 3))
def test_noise_maps_to_slots_by_the_two_level_inverse_cdf(seed, capacities, tile, draws):
    """One number at a time: a block by the first uniform, a slot in it by the second."""
    caches, matrix = caches_of(seed, capacities, tile)
    noise = np.random.default_rng(seed + 1).random((2, draws, 2))
    drawn = draw_from_caches(caches, noise)
    if not np.isfinite(drawn.log_partition).all():
        return
    # The naive map cuts blocks every BLOCK slots: spread each cache to whole blocks first.
    blocks = stream_of(matrix, capacities)
    spread = np.full((2, len(blocks) * BLOCK), -np.inf)
    slot_of = np.zeros(len(blocks) * BLOCK, int)
    for number, (start, scores) in enumerate(blocks):
        spread[:, number * BLOCK : number * BLOCK + scores.shape[1]] = scores
        slot_of[number * BLOCK : (number + 1) * BLOCK] = start + np.arange(BLOCK)
    for row in range(2):
        for draw in range(draws):
            expected = slot_of[naive_slot(spread[row], *noise[row, draw])]
            assert drawn.slots[row, draw] == expected
            assert drawn.scores[row, draw] == pytest.approx(matrix[row, expected], abs=1e-12)


@given(seed=seeds, capacities=capacities, tile=tiles, data=st.data())
def test_top_k_streamed_is_top_k_of_the_matrix(seed, capacities, tile, data):
    caches, matrix = caches_of(seed, capacities, tile)
    k = data.draw(st.integers(1, matrix.shape[1]))
    best, places = best_of_all_groups(caches, k)
    expected, columns = approximate_top_k_with_indices(matrix, k)
    np.testing.assert_allclose(best, expected, rtol=1e-12, atol=1e-12)
    there = np.isfinite(expected)
    np.testing.assert_array_equal(places[there], columns[there])


@given(capacities=st.lists(st.integers(1, 9), min_size=1, max_size=4), data=st.data())
def test_group_runs_cover_every_group_once_in_order(capacities, data):
    slots = list(range(sum(capacities)))
    k = data.draw(st.integers(1, len(slots)))
    starts = np.cumsum([0, *capacities])
    groups = []
    for stretches, count, width in group_runs(tuple(capacities), k):
        covered = [
            int(starts[cache]) + start + at
            for cache, start, size in stretches
            for at in range(size)
        ]
        assert width == 0 or len(stretches) == 1
        cut = [covered] if width == 0 else np.reshape(covered, (count, width)).tolist()
        groups += cut
    assert groups == [list(group) for group in np.array_split(slots, k)]


@pytest.mark.parametrize("name", EAGER)
@given(seed=seeds, capacities=capacities)
def test_all_backends_draw_the_same_slots(name, seed, capacities):
    backend = EAGER[name]
    noise = np.random.default_rng(seed).random((2, 3, 2))
    verbs = backend.module.CacheManager.backend
    theirs, _ = caches_of(seed, capacities, BLOCK, backend=verbs, native=backend.to_native)
    ours, _ = caches_of(seed, capacities, BLOCK)
    given_draw = draw_from_caches(theirs, backend.to_native(noise))
    expected = draw_from_caches(ours, noise)
    usable = np.isfinite(expected.log_partition)
    np.testing.assert_array_equal(
        np.asarray(backend.to_numpy(given_draw.slots))[usable], expected.slots[usable]
    )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_law_holds_in_the_tails_of_a_million_slots(dtype):
    """Scores spread over 40 nats, in eighty levels of equal weight: chi-square on the levels.

    Each level is 40 / 79 nats above the next and has as many more slots; the rarest slots are
    e^-40 times as likely as the most likely one.
    """
    slots, levels, draws = 2**20, 80, 40_000
    rng = np.random.default_rng(0)
    heights = np.linspace(-40.0, 0.0, levels)
    share = np.exp(-heights / 4)
    level = rng.choice(levels, size=slots, p=share / share.sum())
    table = heights[level][:, None].astype(dtype)
    law = np.bincount(level, minlength=levels) * np.exp(heights)
    law /= law.sum()
    cache = NegativeCache({"e": table}, np.zeros(slots, np.int32))
    loss = CacheClassificationLoss("e", ("e",), num_samples=draws, generator=11)
    drawn = loss.retrieve(np.ones((1, 1), dtype), cache)
    counts = np.bincount(level[drawn.slots], minlength=levels)
    assert chi_square_is_plausible(counts, law)
    assert not chi_square_is_plausible(counts, np.roll(law, 1))
    np.testing.assert_allclose(
        drawn.log_partition,
        np.log(np.exp(table.astype(np.float64)).sum()),
        rtol=1e-6 if dtype == "float32" else 1e-12,
    )


def step_memory(capacity, tile_bytes=2**20):
    """Return NumPy's peak of new memory in retrieval from a cache of `capacity` slots, in bytes."""
    rows, width = 16, 8
    rng = np.random.default_rng(0)
    cache = NegativeCache(
        {"e": rng.standard_normal((capacity, width), np.float32)}, np.zeros(capacity, np.int32)
    )
    queries = rng.standard_normal((rows, width), np.float32)
    loss = CacheClassificationLoss("e", ("e",), generator=0, tile_bytes=tile_bytes)
    tracemalloc.start()
    loss.retrieve(queries, cache)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


def test_memory_does_not_grow_with_the_cache_but_for_a_number_per_block():
    small, large = step_memory(2**16), step_memory(2**19)
    per_block = 16 * (2**19 - 2**16) / BLOCK * 8  # a float64 for each query and block
    matrix = 16 * 2**19 * 4
    # Counting written slots makes one pass over the ages, 4 bytes a slot.
    assert large < small + 4 * per_block + 4 * (2**19 - 2**16)
    assert large < matrix / 2


def test_no_score_matrix_is_allocated_in_torch():
    rows, capacity = 32, 2**17
    cache = NegativeCache({"e": torch.randn(capacity, 8)}, torch.zeros(capacity, dtype=torch.int32))
    loss = negcache_torch.CacheClassificationLoss("e", ("e",), generator=0, tile_bytes=2**20)
    with torch.profiler.profile(profile_memory=True) as profile:
        loss.retrieve(torch.randn(rows, 8), cache)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert 0 < largest <= 2**20 < rows * capacity * 4
