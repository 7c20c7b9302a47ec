"""The candidates in NumPy, where there is no backward pass."""

from collections.abc import Callable
from typing import Any

import numpy as np
from _harness import handler_of

import negcache_core as negcache


def candidates(slots: int, width: int, rows: int, vocabulary: int) -> dict[str, Callable[[], Any]]:
    """Return the bare product, a step on a full cache, and the published algorithm."""
    rng = np.random.default_rng(0)
    embedding = rng.standard_normal((vocabulary, width), np.float32) / width**0.5
    query = rng.standard_normal((rows, width), np.float32)
    ids = rng.integers(0, vocabulary, rows)
    handler = handler_of(negcache, slots, width, "int64", "float32")
    handler.cache.data["id"][:] = np.arange(slots) % vocabulary
    handler.cache.data["embedding"][:] = embedding[handler.cache.data["id"]]
    handler.cache.age[:] = np.arange(slots)
    data = {key: value.copy() for key, value in handler.cache.data.items()}

    def step() -> None:
        handler.update_cache_and_compute_loss(
            lambda features: embedding[features["id"]], query, embedding[ids], {"id": ids}
        )

    def published() -> None:
        scores = query @ data["embedding"].T
        noise = -np.log(-np.log(rng.random(scores.shape, np.float32) + np.float32(1e-9)))
        drawn = np.argmax(scores + noise, axis=1)
        positive, negative = embedding[ids], embedding[data["id"][drawn]]
        every = np.concatenate([(query * positive).sum(1)[:, None], scores], axis=1)
        every = np.exp(every - every.max(axis=1, keepdims=True))
        miss = 1 - every[:, 0] / every.sum(axis=1)
        np.mean(miss * (query * (negative - positive)).sum(1))
        for key, values in (("embedding", negative), ("id", ids)):
            data[key] = data[key].copy()
            data[key][drawn] = values

    return {"product": lambda: query @ data["embedding"].T, "step": step, "published": published}
