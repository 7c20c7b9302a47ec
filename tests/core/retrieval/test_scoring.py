"""Scores far out, in every floating dtype, and the invariances of the loss."""

import ml_dtypes
import numpy as np
import pytest
from backends import BACKENDS, EAGER
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds, towers

from negcache_core import EMPTY, NegativeCache

DTYPES = ("float16", "bfloat16", "float32", "float64")


def native(backend, array, dtype):
    """Convert through float64: NumPy's own libraries do not all know ml_dtypes."""
    if backend.name == "numpy":
        return np.asarray(array).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    array = backend.to_native(np.asarray(array, np.float64))
    xp = backend.module.CacheManager.backend.xp
    return xp.astype(array, getattr(xp, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "array-api-strict"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_cross_entropy_is_finite_far_out(name, dtype, sign):
    """Scores of +-10,000: the value, in float32 or better, and finite losses and metrics."""
    backend = BACKENDS[name]
    rows = native(backend, [[100.0], [-100.0], [99.0]], dtype)
    age = backend.to_native(np.asarray([0, 3, EMPTY], np.int32))
    loss = backend.module.CacheClassificationLoss("e", ("e",))

    def script(cache, batch):
        return loss(
            lambda features: features["e"],
            batch["query"],
            batch["positive"],
            cache,
            noise=batch["noise"],
        )

    batch = {
        "query": native(backend, [[100.0], [100.0]], dtype),
        "positive": native(backend, [[sign * 100.0], [-sign * 100.0]], dtype),
        "noise": backend.to_native(np.full((2, 1, 2), 0.5)),
    }
    cache = backend.module.NegativeCache({"e": rows}, age)
    result = backend.numpy(backend.run(script, cache, batch))
    # One row ties with the positive at 10,000 and the other is at -10,000, or 20,000 away.
    tied, lost = np.log(2.0), 20_000.0
    expected = np.mean([tied, lost])
    np.testing.assert_allclose(result.loss, expected, rtol=1e-6)
    np.testing.assert_allclose(result.interpretable_loss, expected, rtol=1e-6)
    assert np.isfinite(result.training_loss)
    assert result.loss.dtype == (np.float64 if dtype == "float64" else np.float32)
    assert all(np.isfinite(value) for value in result.metrics.values())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["torch", "tensorflow"])
def test_half_types_are_scored_in_float32(name, dtype):
    """The loss of rounded embeddings, not a rounded loss."""
    backend = BACKENDS[name]
    rng = np.random.default_rng(0)
    rounded = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16
    rows, query, positive = (
        rng.standard_normal((n, 64)).astype(rounded).astype(np.float64) for n in (50, 4, 4)
    )

    def run(dtype):
        loss = backend.module.CacheClassificationLoss("e", ("e",))
        cache = backend.module.NegativeCache(
            {"e": native(backend, rows, dtype)}, backend.to_native(np.zeros(50, np.int32))
        )
        arrays = (native(backend, array, dtype) for array in (query, positive))
        result = loss(lambda features: features["e"], *arrays, cache)
        return float(backend.to_numpy(result.interpretable_loss))

    assert run(dtype) == pytest.approx(run("float64"), rel=1e-5)


def loss_per_query(backend, problem, data, age, **options):
    loss = backend.module.CacheClassificationLoss(
        "embedding", ("x",), reducer=None, scale=float(problem.scale), **options
    )
    result = loss(
        lambda features: features["x"] @ backend.to_native(problem.W),
        backend.to_native(problem.y @ problem.V),
        backend.to_native(problem.x_positive @ problem.W),
        backend.native(NegativeCache(data, age)),
        pos_features={"x": backend.to_native(problem.x_positive)},
        noise=backend.to_native(np.full((len(problem.y), 1, 2), 0.5)),
    )
    return np.asarray(backend.to_numpy(result.interpretable_loss))


@pytest.mark.parametrize("name", EAGER)
@given(problem=towers(stale=True, max_slots=7, max_queries=3), seed=seeds)
def test_loss_does_not_know_the_order_or_the_number_of_slots(name, problem, seed):
    backend, data = EAGER[name], problem.cache_data
    rng = np.random.default_rng(seed)
    base = loss_per_query(backend, problem, data, problem.age)
    order = rng.permutation(len(problem.age))
    permuted = loss_per_query(
        backend, problem, {k: v[order] for k, v in data.items()}, problem.age[order]
    )
    # Garbage in slots that were never written must not count either.
    more = {
        key: np.concatenate([v, rng.standard_normal((3, *v.shape[1:]))]) for key, v in data.items()
    }
    age = np.concatenate([problem.age, np.full(3, EMPTY, np.int32)])
    np.testing.assert_allclose(permuted, base, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(
        loss_per_query(backend, problem, more, age), base, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("name", EAGER)
@given(problem=towers(stale=True, max_slots=5), shift=st.floats(-50, 50))
def test_a_shift_of_all_scores_changes_no_loss(name, problem, shift):
    backend = EAGER[name]
    base, shifted = (
        loss_per_query(
            backend,
            problem,
            problem.cache_data,
            problem.age,
            score_transform=lambda s, by=by: s + by,
        )
        for by in (0.0, shift)
    )
    np.testing.assert_allclose(shifted, base, rtol=1e-9, atol=1e-9)
