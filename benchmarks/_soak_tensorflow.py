"""The soak in TensorFlow: one trace of a handler's step serves every batch size."""

import functools
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import negcache_tensorflow as negcache
import tensorflow as tf
from _soak_law import Problem
from _soak_problem import (
    DATA_KEYS,
    DECAY,
    FIELDS,
    INPUTS,
    RATE,
    REFRESHED,
    SCALE,
    Arrays,
    Batch,
    Turn,
    features_of_no_item,
    handler_of,
)

tf.config.threading.set_intra_op_parallelism_threads(1)  # steps are small
tf.config.threading.set_inter_op_parallelism_threads(1)

RAISED = tf.errors.InvalidArgumentError  # by the item network


def live_tensors() -> int:
    """Return the number of tensors, including symbolic ones, and variables that are tracked."""
    kinds = (tf.Tensor, tf.Variable)
    return sum(issubclass(type(each), kinds) for each in gc.get_objects())


def _specs(draws: int) -> Batch:
    features = {
        key: tf.TensorSpec([None, *shape], dtype)
        for key, (shape, dtype) in FIELDS.items()
        if key != "embedding"
    }
    rows, matrix = (tf.TensorSpec([None, *more], tf.float64) for more in ((), (INPUTS,)))
    spoil = tf.TensorSpec([None, draws], tf.float64)
    return Batch(matrix, features, rows, rows, spoil, tf.TensorSpec([], tf.bool))


class Soaked:
    """A new handler and its towers; steps, saves and loads."""

    sizes = None

    def __init__(self, turn: Turn, towers: Arrays, seed: int) -> None:
        self.handler = handler_of(negcache, turn, seed)
        self.weights = {key: tf.Variable(each) for key, each in towers.items()}
        traced = functools.partial(tf.function, autograph=False)
        self._step = traced(self._traced_step, input_signature=[_specs(turn.draws)])
        self._refresh = {
            count: traced(
                functools.partial(self._traced_refresh, count),
                input_signature=[tf.TensorSpec([count], tf.float64)],
            )
            for count in REFRESHED
        }

    def towers(self) -> Arrays:
        """Return a copy of the towers' weights."""
        return {key: each.numpy().copy() for key, each in self.weights.items()}

    def cache(self) -> Any:
        """Return the live cache."""
        return self.handler.cache

    def _traced_step(self, batch: Batch) -> Any:
        seen: list[tf.Tensor] = []
        item, features = self.weights["item"], batch.features

        def network(features: dict[str, tf.Tensor]) -> tf.Tensor:
            fresh = tf.matmul(features["x"], item) + tf.reshape(batch.spoil_drawn, (-1, 1))
            with tf.control_dependencies([tf.debugging.Assert(~batch.fails, ["fails"])]):
                fresh = tf.identity(fresh)
            seen.extend([features["serial"], fresh])
            return fresh

        with tf.GradientTape() as tape:
            positive = tf.matmul(features["x"], item) + batch.spoil[:, None]
            query = tf.matmul(batch.y, self.weights["query"])
            loss = self.handler.update_cache_and_compute_loss(
                network, query, positive, features, sample_weight=batch.weight
            )
        variables = list(self.weights.values())
        for weights, gradient in zip(variables, tape.gradient(loss, variables), strict=True):
            sound = tf.reduce_all(tf.math.is_finite(gradient))
            weights.assign(tf.where(sound, DECAY * weights - RATE * gradient, weights))
        return loss, positive, *seen

    def step(self, batch: Batch) -> tuple[Any, ...]:
        """Take a step; return the loss, the positives, and the serials and embeddings drawn."""
        return tuple(each.numpy() for each in self._step(tf.nest.map_structure(_tensor, batch)))

    def _traced_refresh(self, count: int, spoil: tf.Tensor) -> Any:
        seen: list[tf.Tensor] = []

        def network(features: dict[str, tf.Tensor]) -> tf.Tensor:
            fresh = tf.matmul(features["x"], self.weights["item"]) + spoil[:, None]
            seen.extend([features["serial"], fresh])
            return fresh

        self.handler.refresh(network, count)
        return seen

    def refresh(self, count: int, spoil: Any) -> tuple[Any, Any]:
        """Refresh; return the serials and the embeddings."""
        serials, fresh = self._refresh[count](tf.constant(spoil))
        return serials.numpy(), fresh.numpy()

    def save(self, path: Path) -> None:
        """Write the state."""
        self.handler.save(path)

    def load(self, path: Path) -> None:
        """Read it into this handler."""
        self.handler.load(path)

    def draw(self, y: Any) -> Any:
        """Return the slots that the handler draws."""
        query = tf.matmul(y, self.weights["query"])
        features = tf.nest.map_structure(_tensor, features_of_no_item(len(y)))
        return self.handler.retrieve(query, features).slots["cache"].numpy()


def gradients(problem: Problem, estimator: str) -> Callable[[Any], tuple[Any, ...]]:
    """Return a function of the noise: the loss's gradients by both towers and the scale."""
    towers = (problem.towers["query"], problem.towers["item"], problem.y.dtype.type(SCALE))
    given = tf.nest.map_structure(_tensor, (towers, problem.y, problem.x, problem.data))
    traced, age = _traced_gradients(estimator), tf.constant(problem.age)
    return lambda noise: tuple(each.numpy() for each in traced(*given, age, tf.constant(noise)))


@functools.cache
def _traced_gradients(estimator: str) -> Callable[..., Any]:
    """Return the gradients of a loss as one traced function; one trace for each size."""
    now: dict[str, tf.Tensor] = {}
    loss = negcache.CacheClassificationLoss(
        "embedding", DATA_KEYS, scale=lambda: now["scale"], estimator=estimator, generator=0
    )

    @functools.partial(tf.function, autograph=False)
    def gradients(leaves: Any, y: Any, x: Any, data: Any, age: Any, noise: Any) -> Any:
        query_tower, item_tower, now["scale"] = leaves
        with tf.GradientTape() as tape:
            tape.watch(leaves)
            result = loss(
                lambda features: tf.matmul(features["x"], item_tower),
                tf.matmul(y, query_tower),
                tf.matmul(x, item_tower),
                negcache.NegativeCache(data, age),
                noise=noise,
            )
        return tape.gradient(result.loss, leaves)

    return gradients


def _tensor(value: Any) -> tf.Tensor:
    return tf.convert_to_tensor(value)
