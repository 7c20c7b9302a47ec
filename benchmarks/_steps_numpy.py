"""The candidates in NumPy, where there is no backward pass."""

import functools
import tracemalloc
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
from _harness import copied_update, handler_of, result_of

import negcache_core as negcache


class Candidates:
    """Makes each candidate on demand, by name: its methods return what to time."""

    def __init__(self, slots: int, width: int, rows: int, vocabulary: int) -> None:
        self.rng = np.random.default_rng(0)
        self.slots, self.width = slots, width
        self.embedding = self.rng.standard_normal((vocabulary, width), np.float32) / width**0.5
        self.query = self.rng.standard_normal((rows, width), np.float32)
        self.features = {"id": self.rng.integers(0, vocabulary, rows)}
        self.positive = self.network(self.features)
        self.all_ids = np.arange(slots) % vocabulary

    def network(self, features: dict[str, Any]) -> Any:
        """Look embeddings up."""
        return self.embedding[features["id"]]

    def full_handler(self, dtype: Any) -> Any:
        """Return a handler with a full cache."""
        handler = handler_of(negcache, self.slots, self.width, "int64", dtype)
        handler.cache.data["id"][:] = self.all_ids
        handler.cache.data["embedding"][:] = self.embedding[self.all_ids]
        handler.cache.age[:] = np.arange(self.slots)
        return handler

    @functools.cached_property
    def handler(self) -> Any:
        """The handler of float32 rows, shared by candidates."""
        return self.full_handler(np.float32)

    @functools.cached_property
    def to_commit(self) -> tuple[Any, ...]:
        """What one step commits."""
        given = (self.positive, self.features)
        return result_of(self.handler, self.network, self.query, *given), *given

    def product(self) -> Callable[[], Any]:
        """Multiply queries and cache."""
        table = self.handler.cache.data["embedding"]
        return lambda: self.query @ table.T

    def step(self, handler: Any = None) -> Callable[[], Any]:
        """Take a whole step."""
        return functools.partial(
            (handler or self.handler).update_cache_and_compute_loss,
            self.network,
            self.query,
            self.positive,
            self.features,
        )

    def bfloat16_step(self) -> Callable[[], Any]:
        """Take the same on bfloat16 rows."""
        return self.step(self.full_handler(ml_dtypes.bfloat16))

    def float16_step(self) -> Callable[[], Any]:
        """Take the same on float16 rows."""
        return self.step(self.full_handler(np.float16))

    def update(self) -> Callable[[], Any]:
        """Write a step's rows in place."""
        return functools.partial(self.handler.commit, *self.to_commit)

    def copying_update(self) -> Callable[[], Any]:
        """Write a step's rows into a copy."""
        return functools.partial(copied_update, self.handler, *self.to_commit)

    def published(self) -> Callable[[], Any]:
        """Take a step of the published algorithm."""
        data = {"id": self.all_ids, "embedding": self.embedding[self.all_ids]}

        def published() -> None:
            scores = self.query @ data["embedding"].T
            noise = -np.log(-np.log(self.rng.random(scores.shape, np.float32) + np.float32(1e-9)))
            drawn = np.argmax(scores + noise, axis=1)
            negative = self.embedding[data["id"][drawn]]
            positive_score = (self.query * self.positive).sum(1)
            every = np.concatenate([positive_score[:, None], scores], axis=1)
            every = np.exp(every - every.max(axis=1, keepdims=True))
            miss = 1 - every[:, 0] / every.sum(axis=1)
            np.mean(miss * ((self.query * negative).sum(1) - positive_score))
            for key, values in (("embedding", negative), ("id", self.features["id"])):
                data[key] = data[key].copy()
                data[key][drawn] = values

        return published


def bytes_of_a_step(step: Callable[[], Any], *size: int) -> int:
    """Return the highest sum of NumPy's allocations less frees during one step."""
    del size
    tracemalloc.start()
    step()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak
