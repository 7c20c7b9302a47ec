"""The soak in NumPy: no gradients, so the towers drift."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from _soak_law import Problem, chained
from _soak_problem import (
    DATA_KEYS,
    DECAY,
    RATE,
    SCALE,
    Arrays,
    Batch,
    Turn,
    features_of_no_item,
    handler_of,
)

import negcache_core as negcache
from negcache_core import exact
from negcache_core.losses.estimators import ESTIMATORS, SampledSoftmax
from negcache_core.losses.surrogate import positive_weight

RAISED = InterruptedError  # by the item network


def live_tensors() -> int:
    """Return the number of arrays that something refers to: the collector does not track arrays."""
    every = (gc.get_referents(each) for each in gc.get_objects())
    return len({id(one) for found in every for one in found if type(one) is np.ndarray})


class Soaked:
    """A new handler and its towers; steps, saves and loads."""

    sizes = None

    def __init__(self, turn: Turn, towers: Arrays, seed: int) -> None:
        self.handler, self.weights = handler_of(negcache, turn, seed), towers
        self.rng = np.random.default_rng(seed)

    def towers(self) -> Arrays:
        """Return the towers' weights."""
        return self.weights

    def cache(self) -> Any:
        """Return the live cache."""
        return self.handler.cache

    def step(self, batch: Batch) -> tuple[Any, ...]:
        """Take a step; return the loss, the positives, and the serials and embeddings drawn."""
        seen: list[Any] = []

        def network(features: Arrays) -> Any:
            if batch.fails:
                raise RAISED
            fresh = features["x"] @ self.weights["item"] + batch.spoil_drawn.reshape(-1, 1)
            seen.extend([features["serial"], fresh])
            return fresh

        positive = batch.features["x"] @ self.weights["item"] + batch.spoil[:, None]
        query = batch.y @ self.weights["query"]
        with np.errstate(invalid="ignore"):  # embeddings that are not finite give such losses
            loss = self.handler.update_cache_and_compute_loss(
                network, query, positive, batch.features, sample_weight=batch.weight
            )
        for name, weights in self.weights.items():
            drift = RATE * self.rng.standard_normal(weights.shape)
            self.weights[name] = DECAY * weights + drift * (1 - DECAY**2) ** 0.5
        return loss, positive, *seen

    def refresh(self, count: int, spoil: Any) -> tuple[Any, Any]:
        """Refresh; return the serials and the embeddings."""
        seen: list[Any] = []

        def network(features: Arrays) -> Any:
            fresh = features["x"] @ self.weights["item"] + spoil[:, None]
            seen.extend([features["serial"], fresh])
            return fresh

        self.handler.refresh(network, count)
        return seen[0], seen[1]

    def save(self, path: Path) -> None:
        """Write the state."""
        self.handler.save(path)

    def load(self, path: Path) -> None:
        """Read it into this handler."""
        self.handler.load(path)

    def draw(self, y: Any) -> Any:
        """Return the slots that the handler draws."""
        query = y @ self.weights["query"]
        return self.handler.retrieve(query, features_of_no_item(len(y))).slots["cache"]


def gradients(problem: Problem, estimator: str) -> Callable[[Any], tuple[Any, ...]]:
    """Return a function of the noise: the surrogate's gradients, in closed form."""
    query, positive, fresh = problem.arrays
    loss = negcache.CacheClassificationLoss(
        "embedding", DATA_KEYS, scale=SCALE, estimator=estimator, generator=0
    )
    cache = negcache.NegativeCache(problem.data, problem.age)

    def of(noise: Any) -> tuple[Any, ...]:
        drawn = loss.retrieve(query, cache, noise=noise)
        scores = SCALE * np.sum(query * positive, axis=1)
        law = SampledSoftmax(scores, drawn.log_partition, drawn.drawn, pool=drawn.pool)
        weights = ESTIMATORS[estimator].weigh(law, xp=np)
        miss = positive_weight(law, weights, xp=np)
        slots = drawn.slots.reshape(drawn.drawn.shape)
        return chained(
            problem,
            exact.surrogate_gradients(weights, miss, slots, query, positive, fresh, scale=SCALE),
        )

    return of
