"""The soak in JAX: steps are jitted, for two batch sizes, and the state is donated."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import negcache_jax as negcache
import numpy as np
from _soak_law import Problem
from _soak_problem import (
    DATA_KEYS,
    DECAY,
    RATE,
    ROWS,
    SCALE,
    Arrays,
    Batch,
    Turn,
    features_of_no_item,
    handler_of,
)

jax.config.update("jax_enable_x64", True)  # noqa: FBT003 - the law is checked in float64

RAISED = InterruptedError  # by the item network


def live_tensors() -> int:
    """Return the number of arrays that JAX keeps."""
    return len(jax.live_arrays())


class Soaked:
    """A new handler, its state and its towers; steps, saves and loads."""

    sizes = (ROWS // 4, ROWS)

    def __init__(self, turn: Turn, towers: Arrays, seed: int) -> None:
        # JAX keeps compiled programs, even of handlers that are gone: about 1 MB for each.
        jax.clear_caches()
        self.handler = handler_of(negcache, turn, seed)
        self.state = self.handler.init(jax.random.key(seed))
        self.weights = jax.tree.map(jnp.asarray, towers)
        self._step = jax.jit(self._traced_step, static_argnums=2, donate_argnums=(0, 1))
        self._refresh = jax.jit(self._traced_refresh, donate_argnums=0)

    def towers(self) -> Arrays:
        """Return a copy of the towers' weights."""
        return jax.tree.map(np.array, self.weights)

    def cache(self) -> Any:
        """Return the current cache."""
        return self.state.caches["cache"]

    def _traced_step(self, state: Any, weights: Any, fails: Any, batch: Batch) -> Any:
        """Take a step; a network can only raise while it is traced."""

        def loss_of(weights: Any) -> Any:
            seen: list[jax.Array] = []

            def network(features: dict[str, jax.Array]) -> jax.Array:
                if fails:
                    raise RAISED
                fresh = features["x"] @ weights["item"] + batch.spoil_drawn.reshape(-1, 1)
                seen.extend([features["serial"], fresh])
                return fresh

            features = batch.features
            positive = features["x"] @ weights["item"] + batch.spoil[:, None]
            query = batch.y @ weights["query"]
            loss, after = self.handler.update_cache_and_compute_loss(
                state, network, query, positive, features, sample_weight=batch.weight
            )
            return loss, (after, (loss, positive, *seen))

        gradients, (after, found) = jax.grad(loss_of, has_aux=True)(weights)

        def learned(weights: jax.Array, gradient: jax.Array) -> jax.Array:
            sound = jnp.isfinite(gradient).all()
            return jnp.where(sound, DECAY * weights - RATE * gradient, weights)

        return after, jax.tree.map(learned, weights, gradients), found

    def step(self, batch: Batch) -> tuple[Any, ...]:
        """Take a step; return the loss, the positives, and the serials and embeddings drawn."""
        given = batch._replace(fails=False)
        self.state, self.weights, found = self._step(self.state, self.weights, batch.fails, given)
        return tuple(np.asarray(each) for each in found)

    def _traced_refresh(self, state: Any, item: Any, spoil: Any) -> Any:
        seen: list[jax.Array] = []

        def network(features: dict[str, jax.Array]) -> jax.Array:
            fresh = features["x"] @ item + spoil[:, None]
            seen.extend([features["serial"], fresh])
            return fresh

        return self.handler.refresh(state, network, spoil.shape[0]), seen

    def refresh(self, count: int, spoil: Any) -> tuple[Any, Any]:
        """Refresh; return the serials and the embeddings."""
        del count  # the spoil's
        self.state, seen = self._refresh(self.state, self.weights["item"], spoil)
        return tuple(np.asarray(each) for each in seen)

    def save(self, path: Path) -> None:
        """Write the state."""
        self.handler.save(self.state, path)

    def load(self, path: Path) -> None:
        """Read it into this handler's state."""
        self.state = self.handler.load(self.state, path)

    def draw(self, y: Any) -> Any:
        """Return the slots that the handler draws."""
        bound = self.handler.bind(self.state)
        query, features = y @ self.weights["query"], features_of_no_item(len(y))
        found = bound.retrieve(query, jax.tree.map(jnp.asarray, features))
        self.state = bound.state
        return np.asarray(found.slots["cache"])


def gradients(problem: Problem, estimator: str) -> Callable[[Any], tuple[Any, ...]]:
    """Return a function of the noise: the loss's gradients by both towers and the scale."""
    leaves = (problem.towers["query"], problem.towers["item"], np.asarray(SCALE))
    cache = negcache.NegativeCache(problem.data, problem.age)
    given = jax.tree.map(jnp.asarray, (leaves, problem.y, problem.x, cache))
    jitted = _jitted_gradients(estimator)
    return lambda noise: tuple(np.asarray(each) for each in jitted(*given, noise))


@functools.cache
def _jitted_gradients(estimator: str) -> Callable[..., Any]:
    """Return the gradients of a loss as one jitted function."""

    def value(leaves: Any, y: Any, x: Any, cache: Any, noise: Any) -> Any:
        query_tower, item_tower, scale = leaves
        loss = negcache.CacheClassificationLoss(
            "embedding", DATA_KEYS, scale=scale, estimator=estimator
        )
        query, positive = y @ query_tower, x @ item_tower
        network = lambda features: features["x"] @ item_tower  # noqa: E731 - as users write it
        return loss(network, query, positive, cache, noise=noise).loss

    return jax.jit(jax.grad(value))
