"""The candidates in JAX, each one jitted function."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import negcache_jax as negcache
from _harness import copied_update, handler_of, result_of


class Candidates:
    """Makes each candidate on demand, by name: its methods return what to time."""

    def __init__(self, slots: int, width: int, rows: int, vocabulary: int) -> None:
        keys = jax.random.split(jax.random.key(0), 3)
        self.slots, self.width = slots, width
        self.embedding = jax.random.normal(keys[0], (vocabulary, width)) / width**0.5
        self.query = jax.random.normal(keys[1], (rows, width))
        self.features = {"id": jax.random.randint(keys[2], (rows,), 0, vocabulary)}
        self.positive = self.network(self.features)
        self.all_ids = jnp.arange(slots, dtype=jnp.int32) % vocabulary

    def network(self, features: dict[str, jax.Array]) -> jax.Array:
        """Look embeddings up."""
        return self.embedding[features["id"]]

    def full_handler(self, dtype: Any) -> tuple[Any, list[Any]]:
        """Return a handler, and the state of a full cache in a list, to hold the latest."""
        handler = handler_of(negcache, self.slots, self.width, jnp.int32, dtype)
        # A copy of the ids: a state is donated.
        data = {"id": self.all_ids + 0, "embedding": self.embedding.astype(dtype)[self.all_ids]}
        cache = negcache.NegativeCache(data, jnp.arange(self.slots, dtype=jnp.int32))
        return handler, [negcache.HandlerState({"cache": cache}, jax.random.key(1))]

    @functools.cached_property
    def handler(self) -> tuple[Any, list[Any]]:
        """The handler of float32 rows and its state, shared by candidates."""
        return self.full_handler(jnp.float32)

    @functools.cached_property
    def to_commit(self) -> tuple[Any, ...]:
        """What one step commits."""
        handler, held = self.handler

        @jax.jit
        def result(state: Any) -> Any:
            given = (self.query, self.positive, self.features)
            return result_of(handler.bind(state), self.network, *given)

        return result(held[0]), self.positive, self.features

    def product(self) -> Callable[[], Any]:
        """Multiply queries and cache."""
        held = self.handler[1]
        multiply = jax.jit(lambda query, table: query @ table.T)
        return lambda: jax.block_until_ready(
            multiply(self.query, held[0].caches["cache"].data["embedding"])
        )

    def gradient(self, handler: Any) -> Any:
        """Return the jitted step: (query, embedding), state -> (loss, state), gradients."""

        def loss(parameters: Any, state: Any) -> Any:
            query, embedding = parameters
            return handler.update_cache_and_compute_loss(
                state,
                lambda features: embedding[features["id"]],
                query,
                embedding[self.features["id"]],
                self.features,
            )

        return jax.jit(jax.value_and_grad(loss, has_aux=True), donate_argnums=1)

    def step(self, handler_and_state: Any = None) -> Callable[[], Any]:
        """Take a whole step."""
        handler, held = handler_and_state or self.handler
        gradient = self.gradient(handler)

        def step() -> None:
            (_, held[0]), gradients = gradient((self.query, self.embedding), held[0])
            jax.block_until_ready((held[0], gradients))

        return step

    def bfloat16_step(self) -> Callable[[], Any]:
        """Take the same on bfloat16 rows."""
        return self.step(self.full_handler(jnp.bfloat16))

    def float16_step(self) -> Callable[[], Any]:
        """Take the same on float16 rows."""
        return self.step(self.full_handler(jnp.float16))

    def update(self) -> Callable[[], Any]:
        """Write a step's rows in place."""
        handler, held = self.handler
        arguments = self.to_commit

        @functools.partial(jax.jit, donate_argnums=0)
        def write(state: Any, arguments: Any) -> Any:
            bound = handler.bind(state)
            bound.commit(*arguments)
            return bound.state

        def update() -> None:
            held[0] = jax.block_until_ready(write(held[0], arguments))

        return update

    def copying_update(self) -> Callable[[], Any]:
        """Write a step's rows into a copy."""
        handler, held = self.handler
        arguments = self.to_commit
        write = jax.jit(lambda state, given: copied_update(handler.bind(state), *given))
        return lambda: jax.block_until_ready(write(held[0], arguments))

    def published(self) -> Callable[[], Any]:
        """Take a step of the published algorithm."""
        held = [{"id": self.all_ids, "embedding": self.embedding[self.all_ids]}]
        keys, ids = [jax.random.key(2)], self.features["id"]

        def loss(parameters: Any, data: Any, key: Any) -> Any:
            query, embedding = parameters
            scores = jax.lax.stop_gradient(query) @ data["embedding"].T
            drawn = jnp.argmax(scores + jax.random.gumbel(key, scores.shape), axis=1)
            positive, negative = embedding[ids], embedding[data["id"][drawn]]
            positive_score = (query * positive).sum(1)
            own = jax.lax.stop_gradient(positive_score)[:, None]
            miss = 1 - jax.nn.softmax(jnp.concatenate([own, scores], axis=1), axis=1)[:, 0]
            loss = (miss * ((query * negative).sum(1) - positive_score)).mean()
            updated = {
                "embedding": data["embedding"].at[drawn].set(jax.lax.stop_gradient(negative)),
                "id": data["id"].at[drawn].set(ids),
            }
            return loss, updated

        gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))

        def published() -> None:
            key, keys[0] = jax.random.split(keys[0])
            parameters = (self.query, self.embedding)
            (_, held[0]), gradients = gradient(parameters, held[0], key)
            jax.block_until_ready((held[0], gradients))

        return published


def bytes_of_a_step(step: Callable[[], Any], *size: int) -> int:
    """Return what the compiler plans: temporaries, and results without a donated buffer."""
    del step
    makers = Candidates(*size)
    handler, held = makers.handler
    lowered = makers.gradient(handler).lower((makers.query, makers.embedding), held[0])
    planned = lowered.compile().memory_analysis()
    new_results = planned.output_size_in_bytes - planned.alias_size_in_bytes
    return int(planned.temp_size_in_bytes + new_results)
