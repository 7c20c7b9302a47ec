"""in_chunks in JAX: random keys, memory that a compiler plans, and the checks of a step."""

import jax
import jax.numpy as jnp
import negcache_jax as negcache
import numpy as np
import pytest

ROWS, WIDTH, SIZE = 7, 3, 2


def random_rows(rows=ROWS, seed=0, width=WIDTH):
    return jax.random.normal(jax.random.key(seed), (rows, width), jnp.float64)


@pytest.mark.parametrize("typed", [True, False])
def test_a_key_for_each_row_makes_the_masks_those_of_the_whole_batch(typed):
    make = jax.random.key if typed else jax.random.PRNGKey
    keys = jax.random.split(make(1), ROWS)

    def network_of(weights):
        def network(rows):
            kept = jax.vmap(lambda key: jax.random.bernoulli(key, 0.5, (WIDTH,)))(rows["key"])
            return kept * (rows["x"] @ weights)

        return network

    def loss_of(weights, size):
        rows = {"x": random_rows(), "key": keys}
        return jnp.sum(negcache.in_chunks(network_of(weights), size)(rows) ** 2)

    weights = random_rows(WIDTH, 5)
    whole, parts = (jax.grad(loss_of)(weights, size) for size in (ROWS, SIZE))
    np.testing.assert_allclose(parts, whole, rtol=1e-12)


def test_one_key_for_all_rows_draws_the_same_in_each_chunk():
    key = jax.random.key(0)

    def network(x):
        return jax.random.bernoulli(key, 0.5, x.shape) * x

    masks = negcache.in_chunks(network, SIZE)(jnp.ones((2 * SIZE, 50)))
    np.testing.assert_array_equal(masks[:SIZE], masks[SIZE:])


def test_the_compiler_plans_the_memory_of_one_chunk():
    weights = [random_rows(64, seed, 64) for seed in range(6)]

    def planned(rows, size):
        def loss_of(weights, x):
            def network(x):
                for each in weights:
                    x = jnp.tanh(x @ each)
                return x[:, :1]

            network = network if size is None else negcache.in_chunks(network, size)
            return jnp.sum(network(x) ** 2)

        example = jax.ShapeDtypeStruct((rows, 64), jnp.float64)
        compiled = jax.jit(jax.grad(loss_of)).lower(weights, example).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    rows = 4096
    held = 6 * 64 * 8  # activations of a row
    assert planned(rows, None) > rows * held
    assert planned(rows, 64) < 64 * held + rows * 64 * 8  # and at most one copy of the rows


def test_a_forgotten_stop_gradient_is_seen_through_chunks():
    x = random_rows().astype(jnp.float32)
    loss_fn = negcache.NegativeCacheLoss(32, {"x": x}, WIDTH)

    def loss_of(weights, state, still):
        def network(features):
            return features["x"] @ weights

        def drawn(features):
            return jax.lax.stop_gradient(network(features))

        chunked = negcache.in_chunks(network, SIZE)
        item = negcache.in_chunks(drawn, SIZE) if still == "negatives" else chunked
        positives = chunked({"x": x})
        if still == "positives":
            positives = jax.lax.stop_gradient(positives)
        return loss_fn(state, item, x, positives, {"x": x})

    step = jax.jit(jax.value_and_grad(loss_of, has_aux=True), static_argnums=2)
    (_, state), _ = step(jnp.eye(WIDTH), loss_fn.init(jax.random.key(0)), None)
    for still, words in (("positives", "the positives"), ("negatives", "the drawn negatives")):
        with pytest.raises(negcache.OptionError, match=f"{words} carry no gradient"):
            step(jnp.eye(WIDTH), state, still)


def test_a_large_step_in_chunks_is_the_plain_step_with_its_cache():
    features = {"x": random_rows(512)}
    loss_fn = negcache.NegativeCacheLoss(1024, features, features["x"])

    def step_of(size):
        def loss_of(weights, state, x):
            def network(features):
                return jnp.tanh(features["x"] @ weights)

            def query(x):
                return jnp.tanh(x @ weights.T)

            if size is not None:
                network, query = (negcache.in_chunks(each, size) for each in (network, query))
            return loss_fn(state, network, query(x), network({"x": x}), {"x": x})

        return jax.jit(jax.value_and_grad(loss_of, has_aux=True))

    weights, found = random_rows(WIDTH, 3), []
    for size in (None, 64):
        state, step = loss_fn.init(jax.random.key(0)), step_of(size)
        for seed in range(2):
            (loss, state), gradient = step(weights, state, random_rows(512, seed))
        found.append((loss, gradient, state.caches["cache"]))
    (loss, gradient, cache), (other, theirs, their_cache) = found
    np.testing.assert_allclose(other, loss, rtol=1e-12)
    np.testing.assert_allclose(theirs, gradient, rtol=1e-10)
    np.testing.assert_array_equal(their_cache.age, cache.age)
    for key, rows in cache.data.items():
        np.testing.assert_allclose(their_cache.data[key], rows, rtol=1e-12, err_msg=key)
