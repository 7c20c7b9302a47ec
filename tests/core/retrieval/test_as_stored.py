"""Rows multiplied as they are stored: what a GPU does with half types and int8, tried on a CPU."""

import ml_dtypes
import numpy as np
import pytest
import torch
from backends import BACKENDS
from negcache_torch import _backend, _namespace

from negcache_core import EMPTY
from negcache_core.cache.quantized import quantize
from negcache_core.retrieval.lowered import Lowered

BATCH, WIDTH, SLOTS = 5, 16, 300
DTYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
# How far a readout moves if probabilities are rounded to the rows' dtype, relative to the rows.
ROUNDED = {"float16": 1e-3, "bfloat16": 8e-3, "int8": 8e-3}
OPTIONS = {
    "estimator": "exact_query",
    "num_samples": 2,
    "in_batch_negatives": True,
    "id_keys": ("id",),
    "group_key": "group",
    "log_frequency_key": "frequency",
    "tile_bytes": 1,  # two tiles and a remainder
}


@pytest.fixture
def _on_a_device(monkeypatch):
    """Let every backend multiply rows as they are stored; PyTorch has no such product on CPUs."""
    for name in ("numpy", "torch", "jax"):
        backend = type(BACKENDS[name].module.CacheManager.backend)
        monkeypatch.setattr(backend, "multiplies_as_stored", lambda self, table: True)
    monkeypatch.setattr(_backend, "_values_are_at_hand", lambda array: False)
    monkeypatch.setattr(
        _namespace, "product_of_halves", lambda left, right: left.float() @ right.float()
    )


def rows_of(dtype, values):
    if dtype == "int8":
        codes, scale = quantize(values)
        return {"embedding": codes, "embedding_scale": scale}
    return {"embedding": values.astype(DTYPES[dtype])}


def native(backend, tree):
    """Convert arrays; those of bfloat16 go through PyTorch's own."""

    def convert(array):
        if backend.name == "torch" and array.dtype == DTYPES["bfloat16"]:
            return torch.asarray(array.astype(np.float32)).to(torch.bfloat16)
        return backend.to_native(array)

    return {key: convert(array) for key, array in tree.items()}


def problem_of(dtype, seed=0):
    rng = np.random.default_rng(seed)
    age = rng.integers(0, 9, SLOTS).astype(np.int32)
    age[rng.random(SLOTS) < 0.2] = EMPTY
    data = rows_of(dtype, rng.standard_normal((SLOTS, WIDTH)).astype(np.float32))
    data["id"] = rng.integers(0, 30, SLOTS).astype(np.int32)
    data["group"] = rng.integers(0, 2, SLOTS).astype(np.int32)
    data["frequency"] = rng.standard_normal(SLOTS).astype(np.float32)
    features = {
        "id": rng.integers(0, 30, BATCH).astype(np.int32),
        "group": rng.integers(0, 2, BATCH).astype(np.int32),
        "frequency": rng.standard_normal(BATCH).astype(np.float32),
    }
    queries = rng.standard_normal((BATCH, WIDTH)).astype(np.float32)
    return data, age, features, queries, rng.random((BATCH, 2, 2)).astype(np.float32)


def retrieved(backend, problem, queries, scale, **options):
    data, age, features, _, noise = problem
    module = backend.module
    loss = module.CacheClassificationLoss("embedding", ("id",), scale=scale, **options)
    cache = module.NegativeCache(native(backend, data), backend.to_native(age))
    found = loss.retrieve(
        backend.to_native(queries),
        cache,
        pos_features=native(backend, features),
        noise=backend.to_native(noise),
    )
    return backend.numpy(
        found._replace(pool=found.pool._replace(stale=None), stale_embeddings=None)
    )


@pytest.mark.usefixtures("_on_a_device")
@pytest.mark.parametrize("dtype", [*DTYPES, "int8"])
@pytest.mark.parametrize("name", ["numpy", "torch", "jax"])
def test_a_retrieval_is_that_of_rounded_queries(name, dtype, monkeypatch):
    backend, problem = BACKENDS[name], problem_of(dtype)
    lowered = retrieved(backend, problem, problem[3], 0.7, **OPTIONS)
    xp = BACKENDS["numpy"].module.CacheManager.backend.xp
    rounded = Lowered.of(np.float32(0.7) * problem[3], problem[0]["embedding"], xp).raised(xp)
    assert not np.array_equal(rounded, np.float32(0.7) * problem[3])
    monkeypatch.undo()
    plain = retrieved(backend, problem, rounded, None, **OPTIONS)
    np.testing.assert_array_equal(lowered.slots, plain.slots)
    for field in ("log_partition", "entropy", "drawn"):
        np.testing.assert_allclose(getattr(lowered, field), getattr(plain, field), rtol=2e-5)
    ours, theirs = lowered.pool.log_proposal, plain.pool.log_proposal  # of all cross scores
    np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-5)
    most = 1e-5 if name == "numpy" else ROUNDED[dtype]
    np.testing.assert_allclose(lowered.readout, plain.readout, atol=most)


@pytest.mark.usefixtures("_on_a_device")
@pytest.mark.parametrize("dtype", [*DTYPES, "int8"])
def test_large_scales_do_not_overflow(dtype):
    problem = problem_of(dtype)
    found = retrieved(
        BACKENDS["numpy"], problem, problem[3], 1e6, **{**OPTIONS, "estimator": "shared"}
    )
    assert np.isfinite(found.log_partition).all()
    assert (np.abs(found.log_partition) > 65504).any()  # more than a float16 holds


@pytest.mark.parametrize(("slots", "rows"), [(300, 0), (17, 1), (1, 8), (40, 9)])
def test_a_product_of_int8_has_the_sizes_that_its_kernel_takes(slots, rows, monkeypatch):
    """CUDA takes more than 16 rows, and columns in eights but not none; a CPU takes any."""

    def product(left, right):
        assert left.shape[0] > 16
        assert slots < 32 or left is table  # not a copy
        assert right.shape[1] > 0
        assert right.shape[1] % 8 == 0
        return left.int() @ right.int()

    monkeypatch.setattr(torch, "_int_mm", product)
    generator = torch.Generator().manual_seed(0)
    table, queries = (
        torch.randint(-127, 128, (count, WIDTH), dtype=torch.int8, generator=generator)
        for count in (slots, rows)
    )
    found = _backend.TORCH.product_as_stored(table, queries)
    assert torch.equal(found, table.float() @ queries.float().T)


@pytest.mark.usefixtures("_on_a_device")
@pytest.mark.parametrize("dtype", [*DTYPES, "int8"])
def test_a_query_that_is_not_finite_harms_no_other(dtype):
    problem = problem_of(dtype)
    queries = problem[3].copy()
    queries[2, 0] = np.nan
    clean = retrieved(BACKENDS["numpy"], problem, problem[3], 0.7, **OPTIONS)
    found = retrieved(BACKENDS["numpy"], problem, queries, 0.7, **OPTIONS)
    others = np.arange(BATCH) != 2
    for field in ("log_partition", "readout"):
        np.testing.assert_array_equal(getattr(found, field)[others], getattr(clean, field)[others])
