"""The candidates in JAX, each one jitted function."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import negcache_jax as negcache
from _harness import handler_of


def candidates(slots: int, width: int, rows: int, vocabulary: int) -> dict[str, Callable[[], Any]]:
    """Return the bare product, a step on a full cache, and the published algorithm."""
    keys = jax.random.split(jax.random.key(0), 3)
    embedding = jax.random.normal(keys[0], (vocabulary, width)) / width**0.5
    query = jax.random.normal(keys[1], (rows, width))
    ids = jax.random.randint(keys[2], (rows,), 0, vocabulary)

    def full_handler(dtype: Any) -> tuple[Any, Any]:
        handler = handler_of(negcache, slots, width, jnp.int32, dtype)
        all_ids = jnp.arange(slots) % vocabulary
        data = {"id": all_ids, "embedding": embedding[all_ids].astype(dtype)}
        cache = negcache.NegativeCache(data, jnp.arange(slots, dtype=jnp.int32))
        return handler, negcache.HandlerState({"cache": cache}, jax.random.key(1))

    def step_of(dtype: Any) -> Callable[[], Any]:
        handler, state = full_handler(dtype)
        held = [state]

        def loss(parameters: Any, state: Any) -> Any:
            query, embedding = parameters
            return handler.update_cache_and_compute_loss(
                state, lambda f: embedding[f["id"]], query, embedding[ids], {"id": ids}
            )

        compiled = jax.jit(jax.value_and_grad(loss, has_aux=True), donate_argnums=1)

        def step() -> None:
            (_, held[0]), gradients = compiled((query, embedding), held[0])
            jax.block_until_ready((held[0], gradients))

        return step

    table = full_handler(jnp.float32)[1].caches["cache"].data
    multiply = jax.jit(lambda query, table: query @ table.T)
    held = [table, jax.random.key(2)]

    def published_loss(parameters: Any, data: Any, key: Any) -> Any:
        query, embedding = parameters
        scores = jax.lax.stop_gradient(query) @ data["embedding"].T
        drawn = jnp.argmax(scores + jax.random.gumbel(key, scores.shape), axis=1)
        positive, negative = embedding[ids], embedding[data["id"][drawn]]
        positive_score = (query * positive).sum(1)
        every = jnp.concatenate([jax.lax.stop_gradient(positive_score)[:, None], scores], axis=1)
        miss = 1 - jax.nn.softmax(every, axis=1)[:, 0]
        loss = (miss * ((query * negative).sum(1) - positive_score)).mean()
        updated = {
            "embedding": data["embedding"].at[drawn].set(jax.lax.stop_gradient(negative)),
            "id": data["id"].at[drawn].set(ids),
        }
        return loss, updated

    gradient = jax.jit(jax.value_and_grad(published_loss, has_aux=True))

    def published() -> None:
        key, held[1] = jax.random.split(held[1])
        (_, held[0]), gradients = gradient((query, embedding), held[0], key)
        jax.block_until_ready((held[0], gradients))

    return {
        "product": functools.partial(
            lambda *arguments: jax.block_until_ready(multiply(*arguments)),
            query,
            table["embedding"],
        ),
        "step": step_of(jnp.float32),
        "bfloat16 step": step_of(jnp.bfloat16),
        "published": published,
    }
