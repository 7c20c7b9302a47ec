"""The law of the draw: the exact map from noise to slot, chi-square, and invariances."""

import numpy as np
import pytest
from backends import EAGER
from hypothesis import given
from hypothesis import strategies as st
from laws import chi_square_is_plausible, naive_slot
from strategies import seeds

from negcache_core.retrieval.retrieval_fns import gumbel
from negcache_core.retrieval.softmax_draw import draw_from_softmax, inverse_cdf
from negcache_core.retrieval.tiled_scores import BLOCK

# Multiples of 1/8 add without rounding, so that equal laws give equal slots.
eighths = st.integers(-200, 200).map(lambda number: number / 8)


@given(seed=seeds, slots=st.integers(1, 3 * BLOCK), rows=st.integers(1, 3), draws=st.integers(1, 4))
def test_noise_maps_to_the_slot_of_the_two_level_inverse_cdf(seed, slots, rows, draws):
    rng = np.random.default_rng(seed)
    scores = rng.normal(scale=3.0, size=(rows, slots))
    scores[:, rng.random(slots) < 0.3] = -np.inf
    scores[:, rng.integers(slots)] = 0.0
    noise = rng.random((rows, draws, 2))
    given_slots, log_partition = draw_from_softmax(scores, noise)
    expected = [
        [naive_slot(row, first, second) for first, second in pairs]
        for row, pairs in zip(scores, noise, strict=True)
    ]
    np.testing.assert_array_equal(given_slots, expected)
    np.testing.assert_allclose(log_partition, np.log(np.exp(scores).sum(axis=1)), rtol=1e-12)
    assert np.isfinite(np.take_along_axis(scores, given_slots, axis=1)).all()


@pytest.mark.parametrize("edge", [0.0, 1 - 2**-53, 1.0])
def test_the_ends_of_the_noise_never_draw_a_slot_of_no_weight(edge):
    scores = np.full((1, 300), -np.inf)
    scores[0, [3, 140]] = [0.0, -40.0]
    for dtype in (np.float64, np.float32):
        noise = np.full((1, 1, 2), edge)
        slots, _ = draw_from_softmax(scores.astype(dtype), noise)
        assert slots[0, 0] in (3, 140)


def test_rows_of_nothing_have_no_partition():
    slots, log_partition = draw_from_softmax(np.full((2, 5), -np.inf), np.zeros((2, 1, 2)))
    assert (log_partition == -np.inf).all()
    assert ((slots >= 0) & (slots < BLOCK)).all()


@given(scores=st.lists(eighths, min_size=1, max_size=9), shift=eighths, seed=seeds)
def test_a_shift_of_all_scores_changes_no_draw(scores, shift, seed):
    scores = np.asarray([scores])
    noise = np.random.default_rng(seed).random((1, 5, 2))
    slots, log_partition = draw_from_softmax(scores, noise)
    shifted_slots, shifted = draw_from_softmax(scores + shift, noise)
    np.testing.assert_array_equal(slots, shifted_slots)
    np.testing.assert_allclose(shifted, log_partition + shift, rtol=1e-12, atol=1e-12)


@given(scores=st.lists(eighths, min_size=1, max_size=9), seed=seeds, extra=st.integers(1, 300))
def test_empty_slots_at_the_end_change_nothing(scores, seed, extra):
    scores = np.asarray([scores])
    noise = np.random.default_rng(seed).random((1, 5, 2))
    more = np.concatenate([scores, np.full((1, extra), -np.inf)], axis=1)
    for ours, theirs in zip(
        draw_from_softmax(scores, noise), draw_from_softmax(more, noise), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


@given(scores=st.lists(eighths, min_size=2, max_size=9), seed=seeds)
def test_permuting_slots_permutes_the_law(scores, seed):
    scores = np.asarray([scores])
    order = np.random.default_rng(seed).permutation(scores.shape[1])
    grid = np.stack(np.meshgrid([0.5], (np.arange(4096) + 0.5) / 4096), axis=-1).reshape(1, -1, 2)
    counts, permuted = (
        np.bincount(draw_from_softmax(each, grid)[0][0], minlength=scores.shape[1])
        for each in (scores, scores[:, order])
    )
    assert np.abs(counts[order] - permuted).max() <= 1


@pytest.mark.parametrize("name", EAGER)
def test_default_draw_is_softmax(name):
    """20,000 draws of 4 queries by the loss's own generator, against the exact law."""
    backend = EAGER[name]
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((400, 2))
    queries = rng.standard_normal((4, 2))
    draws = 20_000
    loss = backend.module.CacheClassificationLoss(
        "e", ("e",), scale=1.5, num_samples=draws, generator=7
    )
    cache = backend.native(backend.module.NegativeCache({"e": rows}, np.zeros(len(rows), np.int32)))
    drawn = loss.retrieve(backend.to_native(queries), cache)
    slots = np.asarray(backend.to_numpy(drawn.slots)).reshape(4, draws)
    law = np.exp(1.5 * queries @ rows.T)
    law /= law.sum(axis=1, keepdims=True)
    for row, probabilities in zip(slots, law, strict=True):
        counts = np.bincount(row, minlength=len(rows))
        assert chi_square_is_plausible(counts, probabilities)
        assert not chi_square_is_plausible(counts, np.roll(probabilities, 1))


@pytest.mark.parametrize("inv_temp", [1.0, 0.5])
@pytest.mark.parametrize("name", EAGER)
def test_gumbel_max_is_softmax(name, inv_temp):
    backend = EAGER[name]
    scores = np.asarray([2.0, -1.0, 0.5, 3.0, 0.0])
    function = backend.module.GumbelMaxRetrievalFn(inv_temp, generator=3)
    many = backend.to_native(np.tile(scores, (20_000, 1)))
    slots = np.asarray(backend.to_numpy(function(many)))
    law = np.exp(inv_temp * scores)
    counts = np.bincount(slots[:, 0], minlength=5)
    assert chi_square_is_plausible(counts, law / law.sum())


def test_gumbel_noise_has_its_tail():
    """A 23-bit uniform would end at 15.9; the largest 53-bit one gives 36.7, the least -6.5."""
    noise = gumbel(np.asarray([0.0, 0.5, 1 - 2**-53]))
    np.testing.assert_allclose(noise, [-np.log(-np.log(1e-300)), 0.36651292, 36.7368], rtol=1e-5)
    assert np.isfinite(noise).all()


@pytest.mark.parametrize("name", EAGER)
def test_generators_are_seeded(name):
    """One seed, one stream; another seed, another; and None follows the framework's own seed."""
    module, to_numpy = EAGER[name].module, EAGER[name].to_numpy
    scores = EAGER[name].to_native(np.zeros((64, 50)))

    def stream(seed):
        function = module.GumbelMaxRetrievalFn(generator=seed)
        return np.concatenate([np.asarray(to_numpy(function(scores))) for _ in range(2)])

    np.testing.assert_array_equal(stream(5), stream(5))
    assert (stream(5) != stream(6)).any()
    assert (stream(None) != stream(None)).any()
    half = len(stream(5)) // 2
    assert (stream(5)[:half] != stream(5)[half:]).any()


@pytest.mark.parametrize("name", EAGER)
@given(seed=seeds)
def test_inverse_cdf_agrees_everywhere(name, seed):
    backend = EAGER[name]
    rng = np.random.default_rng(seed)
    weights, uniforms = rng.standard_normal((2, 9)), rng.random((2, 4))
    xp = backend.module.CacheManager.backend.xp
    ours = inverse_cdf(backend.to_native(weights), backend.to_native(uniforms), xp=xp)
    np.testing.assert_array_equal(backend.to_numpy(ours), inverse_cdf(weights, uniforms))
