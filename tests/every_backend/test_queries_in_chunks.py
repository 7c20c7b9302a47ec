"""A batch whose scores do not fit is done a few queries at a time: the same step, to rounding.

What a step estimates is enumerated for chunks too, in tests/core/losses/test_estimators.py.
"""

import numpy as np
import pytest
from backends import BACKENDS

from negcache_core.cache.state import EMPTY, NegativeCache

EXACT = {"rtol": 1e-12, "atol": 1e-12}
B, C, D, H = 7, 300, 3, 2  # three blocks of slots
ALL, SOME = 2**30, 8 * 3 * 2 * B  # bytes: for the scores of all queries, and of three with 2 B rows
POISONED = 2
LABELS = {"id_keys": ("id", "query_id"), "group_key": "group"}
STEPS = {
    "paper": {
        "estimator": "paper",
        "num_samples": 2,
        "in_batch_negatives": True,
        "hard": True,
        **LABELS,
    },
    "shared": {"estimator": "shared", "num_samples": 2, "log_frequency_key": "frequency"},
    "shared, top-k": {
        "estimator": "shared",
        "top_k": 40,
        "in_batch_negatives": True,
        "log_frequency_key": "frequency",
        "margin": 0.4,
        **LABELS,
    },
    "corrected exact_query": {
        "estimator": "exact_query",
        "in_batch_negatives": True,
        "staleness_correction": True,
        "margin": 0.4,
        "hard": True,
    },
}
STEPS["matryoshka"] = {
    **STEPS["corrected exact_query"],
    **LABELS,
    "num_samples": 2,
    "matryoshka_dims": (3, 1),
    "log_frequency_key": "frequency",
}


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
    query[POISONED] = np.nan  # has no loss, and reaches no other query's
    hard = rng.standard_normal((B, H, D))
    given = {"x": positive, **labels(B)}
    hard_labels = {key: rng.integers(0, 2, (B, H)) for key in ("id", "query_id", "group")}
    return cache, (query, positive, np.eye(D), np.asarray(1.3)), given, hard, hard_labels


class Step:
    """A loss, and the batch that it is called with; now holds what is differentiated of it."""

    def __init__(self, backend, options, tile_bytes):
        options = dict(options)
        cache, _, self.given, hard, hard_labels = map(backend.native, problem())
        self.hard = hard if options.pop("hard", False) else None
        self.backend, self.hard_labels, self.cache, self.now = backend, hard_labels, cache, {}
        noise = np.random.default_rng(1).random((B, options.get("num_samples", 1), 2))
        self.noise = backend.to_native(noise)
        self.loss = backend.module.CacheClassificationLoss(
            "embedding",
            ("x",),
            scale=lambda: self.now["scale"],
            tile_bytes=tile_bytes,
            reducer=None,
            generator=None if backend.name.startswith("jax") else 0,
            **options,
        )

    def __call__(self, query, positive, tower, scale):
        """Return the result by query; the item tower and the scale are differentiated through."""
        xp, more = self.backend.module.CacheManager.backend.xp, {}
        self.now["scale"] = scale
        if self.hard is not None:
            more["hard_negative_embeddings"] = xp.matmul(self.hard, tower)
            if self.loss.id_keys:
                more["hard_negative_features"] = self.hard_labels
        return self.loss(
            lambda features: xp.matmul(features["x"], tower),
            query,
            xp.matmul(positive, tower),
            self.cache,
            pos_features=self.given,
            noise=self.noise,
            **more,
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


# Four programs are compiled for each step: where that takes long, the one of most options, and
# together all others.
COMPILED = {
    "jax": ("shared, top-k",),
    "jax.jit": ("matryoshka", "paper"),
    "tf.function": ("matryoshka", "shared"),
    "tf.function+xla": ("matryoshka", "shared, top-k"),
}


@pytest.mark.parametrize(
    ("backend", "name"),
    [
        pytest.param(backend, step, id=f"{name}-{step}")
        for name, backend in BACKENDS.items()
        for step in COMPILED.get(name, STEPS)
    ],
)
def test_chunks_of_queries_change_no_loss_no_gradient_and_no_metric(backend, name, chunks):
    sizes, found = chunks(backend), []
    arrays = problem()[1]
    upstream = backend.to_native(np.where(np.arange(B) == POISONED, 0.0, np.linspace(0.5, 2, B)))
    counts = backend.to_native(np.arange(B) != POISONED)
    xp = backend.module.CacheManager.backend.xp
    for tile_bytes in (ALL, SOME):
        step = Step(backend, STEPS[name], tile_bytes)

        def values(arrays, _, step=step):
            got = step(*arrays)
            losses = got.training_loss, got.interpretable_loss
            return losses, got.staleness, got.metrics, got.updated_item_data

        def value(*arrays, step=step):
            return xp.sum(xp.where(counts, step(*arrays).loss, 0.0) * upstream)

        del sizes[:]
        found.append([backend.replay(values, arrays, {})])
        if backend.gradients is not None:
            native = [backend.to_native(array) for array in arrays]
            found[-1].append(tuple(map(np.asarray, backend.gradients(value, native))))
        assert bool(sizes) == (tile_bytes == SOME)
        assert all(rows == B and size < B for rows, size in sizes)
    assert_alike(*found)


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
