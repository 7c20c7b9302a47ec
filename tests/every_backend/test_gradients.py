"""The heart: the enumerated expectation of the training gradient is the exact one."""

import numpy as np
import pytest
import torch
from backends import BACKENDS, EAGER
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import TOLERANCE, expected_gradients, noise_for, results_of
from negcache_torch import CacheClassificationLoss
from strategies import towers

from negcache_core import exact
from negcache_core.cache.state import NegativeCache
from negcache_core.losses.estimators import ESTIMATORS, SampledSoftmax
from negcache_core.losses.surrogate import positive_weight


def competitors(problem, top_k):
    """Return bool (B, C): what a query competes with; all written slots, or each group's best."""
    scores = problem.scale * (problem.y @ problem.V) @ problem.cache_data["embedding"].T
    scores = np.where(problem.written, scores, -np.inf)
    if top_k is None:
        return np.isfinite(scores)
    best = np.zeros(scores.shape, bool)
    for group in np.array_split(np.arange(scores.shape[1]), top_k):
        best[np.arange(len(scores)), group[scores[:, group].argmax(axis=1)]] = True
    return best & np.isfinite(scores)


def draw_law(problem, mask):
    """Return (B, C) draw probabilities; a query with no competitor draws slot 0, for nothing."""
    scores = problem.scale * (problem.y @ problem.V) @ problem.cache_data["embedding"].T
    weights = np.where(mask, np.exp(scores), 0.0)
    weights[:, 0] += ~mask.any(axis=1)
    return weights / weights.sum(axis=1, keepdims=True)


def exact_gradients(problem, mask):
    """Return the exact gradients with respect to V, W and the scale."""
    gradients = exact.softmax_cross_entropy(
        problem.y @ problem.V,
        problem.x_positive @ problem.W,
        problem.cache_data["embedding"],
        fresh_items=problem.x @ problem.W,
        scale=problem.scale,
        mask=mask,
    ).gradients
    by_w = problem.x.T @ gradients.items + problem.x_positive.T @ gradients.positive
    return problem.y.T @ gradients.query, by_w, gradients.scale


def enumerated_by_hand(backend, problem, outcomes, *, top_k, num_samples):
    """The same expectation where there is no autograd: the surrogate's gradients by hand."""
    xp = backend.module.CacheManager.backend.xp
    cache = backend.native(NegativeCache(problem.cache_data, problem.age))
    loss = backend.module.CacheClassificationLoss(
        "embedding",
        ("x",),
        top_k=top_k,
        scale=float(problem.scale),
        num_samples=num_samples,
    )
    arrays = (problem.y @ problem.V, problem.x_positive @ problem.W, problem.x @ problem.W)
    query, positive, fresh = map(backend.to_native, arrays)
    scale = float(problem.scale)
    features = {"x": backend.to_native(problem.x_positive)}

    def gradients(noise):
        drawn = loss.retrieve(query, cache, noise=backend.to_native(noise), pos_features=features)
        scores = scale * xp.sum(query * positive, axis=1)
        law = SampledSoftmax(scores, drawn.log_partition, drawn.drawn, pool=drawn.pool)
        weights = ESTIMATORS[loss.estimator].weigh(law, xp=xp)
        slots = xp.reshape(drawn.slots, drawn.drawn.shape)
        miss = positive_weight(law, weights, xp=xp)
        return exact.surrogate_gradients(weights, miss, slots, query, positive, fresh, scale=scale)

    total = backend.numpy(exact.expectation(outcomes, gradients))
    by_w = problem.x.T @ total[2] + problem.x_positive.T @ total[1]
    return problem.y.T @ total[0], by_w, total[3]


def enumerated(backend, problem, outcomes, *, top_k, num_samples, split):
    """Differentiate the expectation itself: sum the losses of all outcomes by probability."""
    now = {}
    loss = backend.module.CacheClassificationLoss(
        "embedding",
        ("x",),
        top_k=top_k,
        scale=lambda: now["scale"],
        num_samples=num_samples,
    )
    whole = NegativeCache(problem.cache_data, problem.age)
    cache = backend.native(whole)
    if split:
        cut = len(problem.age) // 2
        cache = {
            name: backend.native(NegativeCache({k: v[part] for k, v in whole.data.items()}, age))
            for name, part, age in (
                ("a", slice(cut), whole.age[:cut]),
                ("b", slice(cut, None), whole.age[cut:]),
            )
            if len(age)
        }
    y, x_positive = backend.to_native(problem.y), backend.to_native(problem.x_positive)
    outcomes = [(backend.to_native(noise), probability) for noise, probability in outcomes]

    def value(V, W, scale, noise):
        now["scale"] = scale
        return loss(
            lambda features: features["x"] @ W,
            y @ V,
            x_positive @ W,
            cache,
            pos_features={"x": x_positive},
            noise=noise,
        ).loss

    arrays = [backend.to_native(array) for array in (problem.V, problem.W, problem.scale)]
    return expected_gradients(backend, value, arrays, outcomes)


def assert_unbiased(name, problem, *, top_k=None, num_samples=1, split=False):
    mask = competitors(problem, top_k)
    law = draw_law(problem, mask)
    backend, options = BACKENDS[name], {"top_k": top_k, "num_samples": num_samples}
    split = split and backend.gradients is not None
    cut = len(problem.age) // 2 if split and top_k is None else 0
    outcomes = [
        (noise_for(slots, law, cut), probability)
        for slots, probability in exact.enumerate_draws(law, num_samples)
    ]
    assert sum(probability for _, probability in outcomes) == pytest.approx(1.0, abs=1e-12)
    if backend.gradients is None:
        given = enumerated_by_hand(backend, problem, outcomes, **options)
    else:
        given = enumerated(backend, problem, outcomes, split=split, **options)
    expected = exact_gradients(problem, mask)
    for which, ours, exact_gradient in zip("VWs", given, expected, strict=True):
        np.testing.assert_allclose(ours, exact_gradient, err_msg=which, **TOLERANCE)


# Where a step takes longest, a third of the examples.
PARTS = {"numpy": 1, "array-api-strict": 3, "torch": 1, "tensorflow": 3}


@pytest.mark.parametrize("stale", [False, True], ids=["fresh", "stale"])
@pytest.mark.parametrize("name", EAGER)
def test_expected_gradient_is_the_exact_gradient(name, stale):
    @settings(max_examples=settings.default.max_examples // PARTS[name])
    @given(data=st.data())
    def run(data):
        problem = data.draw(towers(stale=stale))
        top_k = data.draw(st.none() | st.integers(1, len(problem.age)), label="top_k")
        split = data.draw(st.booleans(), label="two caches")
        assert_unbiased(name, problem, top_k=top_k, split=split)

    run()


@pytest.mark.parametrize("name", EAGER)
@settings(max_examples=5)
@given(problem=towers(stale=True, max_slots=3, max_queries=2))
def test_expected_gradient_with_several_draws_per_query(name, problem):
    assert_unbiased(name, problem, num_samples=2)


@pytest.mark.parametrize("name", ["tf.function", "tf.function+xla", "jax", "jax.jit"])
@settings(max_examples=3)
@given(problem=towers(stale=True, max_slots=3))
def test_expected_gradient_when_traced_and_compiled(name, problem):
    assert_unbiased(name, problem)


@given(problem=towers(stale=False))
def test_expected_gradient_through_a_nonlinear_transform(problem):
    """Against autograd of the plain cross-entropy, which knows any transform and temperature."""
    mask = competitors(problem, None)
    V, W, temperature = (
        torch.tensor(array, requires_grad=True) for array in (problem.V, problem.W, problem.scale)
    )

    def transform(scores):
        return torch.sinh(scores / 2) * temperature

    y, x, x_positive = map(torch.as_tensor, (problem.y, problem.x, problem.x_positive))
    query, positive = y @ V, x_positive @ W
    scores = transform(query @ (x @ W).T).masked_fill(~torch.as_tensor(mask), -torch.inf)
    positive_scores = transform((query * positive).sum(1))
    everything = torch.cat([positive_scores[:, None], scores], dim=1)
    full = (torch.logsumexp(everything, dim=1) - positive_scores).mean()
    expected = torch.autograd.grad(full, [V, W, temperature])

    stale = scores.detach().numpy()
    top = np.maximum(stale.max(axis=1, keepdims=True), np.finfo(float).min)  # of no scores: -inf
    weights = np.exp(stale - top)
    weights[:, 0] += ~mask.any(axis=1)
    law = weights / weights.sum(axis=1, keepdims=True)
    loss = CacheClassificationLoss("embedding", ("x",), score_transform=transform)
    cache = BACKENDS["torch"].native(NegativeCache(problem.cache_data, problem.age))
    outcomes = [
        (torch.as_tensor(noise_for(slots, law)), probability)
        for slots, probability in exact.enumerate_draws(law)
    ]
    total = 0.0
    for result, probability in results_of(
        loss, W, y @ V, x_positive @ W, cache, outcomes, pos_features={"x": x_positive}
    ):
        total = total + probability * result.loss
        np.testing.assert_allclose(result.loss.detach(), full.detach(), **TOLERANCE)
    for ours, exact_gradient in zip(
        torch.autograd.grad(total, [V, W, temperature]), expected, strict=True
    ):
        np.testing.assert_allclose(ours, exact_gradient, rtol=1e-9, atol=1e-10)


@given(problem=towers(stale=False, max_slots=6, max_queries=3))
def test_oracle_gradients_are_the_slopes_of_its_loss(problem):
    """The oracle itself, by central differences."""
    epsilon = 1e-6
    arrays = {
        "query": problem.y @ problem.V,
        "positive": problem.x_positive @ problem.W,
        "items": problem.x @ problem.W,
        "scale": problem.scale,
    }

    def loss(**arrays):
        return exact.softmax_cross_entropy(**arrays, mask=problem.written).loss.mean()

    gradients = exact.softmax_cross_entropy(**arrays, mask=problem.written).gradients
    for name, array in arrays.items():
        slope = np.zeros_like(array)
        for place in np.ndindex(array.shape):
            step = np.zeros_like(array)
            step[place] = epsilon
            up, down = (loss(**{**arrays, name: array + s}) for s in (step, -step))
            slope[place] = (up - down) / (2 * epsilon)
        np.testing.assert_allclose(
            getattr(gradients, name), slope, rtol=1e-4, atol=1e-7, err_msg=name
        )
