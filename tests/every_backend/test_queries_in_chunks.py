"""A batch whose scores do not fit is done a few queries at a time: the same step, to rounding.

What a step estimates is enumerated for chunks too, in tests/core/losses/test_estimators.py.
"""

import numpy as np
import pytest
from backends import BACKENDS

from negcache_core.cache.state import EMPTY, NegativeCache

EXACT = {"rtol": 1e-12, "atol": 1e-12}
B, C, D, H = 7, 300, 3, 2  # three blocks of slots
ALL, SOME, ONE = 2**30, 8 * 3 * 2 * B, 1  # bytes for scores: of all queries, of three, of none
LABELS = {"id_keys": ("id", "query_id"), "group_key": "group"}
STEPS = {
    "paper": {"estimator": "paper", "num_samples": 2, "in_batch_negatives": True},
    "paper, hard": {"estimator": "paper", "in_batch_negatives": True, "hard": True, **LABELS},
    "corrected paper": {
        "estimator": "paper",
        "in_batch_negatives": True,
        "staleness_correction": True,
    },
    "shared": {"estimator": "shared", "num_samples": 2, "log_frequency_key": "frequency"},
    "shared, top-k": {
        "estimator": "shared",
        "top_k": 40,
        "in_batch_negatives": True,
        "margin": 0.4,
        **LABELS,
    },
    "exact_query": {"estimator": "exact_query", "in_batch_negatives": True},
    "corrected exact_query": {
        "estimator": "exact_query",
        "in_batch_negatives": True,
        "staleness_correction": True,
        "log_frequency_key": "frequency",
        "margin": 0.4,
        "hard": True,
        **LABELS,
    },
}


def backend_name(backend):
    return backend.name


def problem(seed=0):
    """Return a cache, arrays that are differentiated, and facts of the batch."""
    rng = np.random.default_rng(seed)

    def labels(rows):
        kinds = {"id": 40, "query_id": 40, "group": 2}
        found = {key: rng.integers(0, kind, rows) for key, kind in kinds.items()}
        return {**found, "frequency": rng.normal(size=rows)}

    age = np.where(np.arange(C) % 7 == 3, EMPTY, np.arange(C) % 5).astype(np.int32)
    rows = rng.standard_normal((C, D))
    stale = rows + 0.1 * rng.standard_normal((C, D))
    cache = NegativeCache({"x": rows, "embedding": stale, **labels(C)}, age)
    query, positive = rng.standard_normal((2, B, D))
    query[2] = np.nan  # has no loss, and reaches no other query's
    hard = rng.standard_normal((B, H, D))
    given = {"x": positive, **labels(B)}
    hard_labels = {key: rng.integers(0, 2, (B, H)) for key in ("id", "query_id", "group")}
    return cache, (query, positive, np.eye(D), np.asarray(1.3)), given, hard, hard_labels


def step(backend, cache, given, hard, hard_labels, noise, tile_bytes, options, arrays):
    """Return a step's result; the item tower and the scale are differentiated through."""
    options, use_hard = dict(options), options.get("hard", False)
    options.pop("hard", None)
    query, positive, tower, scale = arrays
    xp = backend.module.CacheManager.backend.xp
    loss = backend.module.CacheClassificationLoss(
        "embedding", ("x",), scale=lambda: scale, tile_bytes=tile_bytes, reducer=None, **options
    )
    more = {}
    if use_hard:
        more = {"hard_negative_embeddings": xp.matmul(hard, tower)}
        more["hard_negative_features"] = hard_labels
    if loss.margin is not None:
        more["pos_features"] = given
    return loss(
        lambda features: xp.matmul(features["x"], tower),
        query,
        xp.matmul(positive, tower),
        cache,
        noise=noise,
        **{"pos_features": given, **more},
    )


@pytest.fixture
def chunks(monkeypatch):
    """Return a function that has a backend's verb leave the sizes that it is called with."""

    def watch(backend):
        verbs, sizes = backend.module.CacheManager.backend, []
        plain = verbs.map_chunks

        def map_chunks(function, arrays, size):
            sizes.append((arrays[0].shape[0], size))
            return plain(function, arrays, size)

        monkeypatch.setattr(verbs, "map_chunks", map_chunks, raising=True)
        return sizes

    return watch


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("backend", BACKENDS.values(), ids=backend_name)
def test_chunks_of_queries_change_no_loss_no_gradient_and_no_metric(backend, name, chunks):
    sizes = chunks(backend)
    cache, arrays, given, hard, hard_labels = problem()
    options = STEPS[name]
    draws = options.get("num_samples", 1)
    noise = np.random.default_rng(1).random((B, draws, 2))
    cache, given, hard, hard_labels, noise = map(
        backend.native, (cache, given, hard, hard_labels, noise)
    )
    upstream = backend.to_native(np.where(np.arange(B) == 2, 0.0, np.linspace(0.5, 2.0, B)))
    counts = backend.to_native(np.arange(B) != 2)
    xp = backend.module.CacheManager.backend.xp

    def result(tile_bytes, arrays):
        return step(
            backend, cache, given, hard, hard_labels, noise, tile_bytes, options, arrays
        )

    found = {}
    for tile_bytes in (ALL, SOME, ONE):
        del sizes[:]

        def values(arrays, batch, tile_bytes=tile_bytes):
            del batch
            got = result(tile_bytes, arrays)
            return (
                got.interpretable_loss,
                got.staleness,
                got.metrics,
                got.updated_item_data,
                got.training_loss,
            )

        def value(*arrays, tile_bytes=tile_bytes):
            got = result(tile_bytes, arrays).loss
            return xp.sum(xp.where(counts, got, 0.0) * upstream)

        found[tile_bytes] = [backend.replay(values, arrays, {})]
        if backend.gradients is not None:
            native = [backend.to_native(array) for array in arrays]
            found[tile_bytes].append(tuple(map(np.asarray, backend.gradients(value, native))))
        assert bool(sizes) == (tile_bytes != ALL)
        assert all(rows == B and size < B for rows, size in sizes)
    for tile_bytes in (SOME, ONE):
        assert_alike(found[tile_bytes], found[ALL])


def assert_alike(ours, whole):
    if isinstance(whole, dict):
        assert ours.keys() == whole.keys()
        for key in whole:
            np.testing.assert_allclose(ours[key], whole[key], err_msg=key, **EXACT)
    elif isinstance(whole, (list, tuple)):
        assert len(ours) == len(whole)
        for our, theirs in zip(ours, whole, strict=True):
            assert_alike(our, theirs)
    else:
        np.testing.assert_allclose(ours, whole, **EXACT)
