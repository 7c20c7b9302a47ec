"""Is what was installed whole? One training step in each framework, compared with its closed form.

python smoke.py              # NumPy, and each framework that is installed
python smoke.py torch jax    # NumPy and these, which must be there

It needs nothing but negcache, so that it runs where only a wheel is installed. With linear scores,
a fresh cache and `estimator="exact_query"` the loss and the gradient by the queries are those of
the full softmax whatever is drawn, so they can be worked out beside it in NumPy.
"""

import importlib.util
import sys

import numpy as np

SCALE = 2.0
DRAWS = np.random.default_rng(0)
ROWS, QUERY, POSITIVE = (DRAWS.normal(size=(4, 3)).astype("float32") for _ in range(3))


def closed_form():
    """Return the mean cross-entropy of POSITIVE against ROWS and itself; its slope by QUERY."""
    scores = SCALE * np.concatenate([(QUERY * POSITIVE).sum(1)[:, None], QUERY @ ROWS.T], axis=1)
    shares = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    pulled = (shares[:, :1] - 1) * POSITIVE + shares[:, 1:] @ ROWS
    return -np.log(shares[:, 0]).mean(), SCALE * pulled / len(QUERY)


def handler_of(negcache):
    specs = {name: negcache.FieldSpec((3,), "float32") for name in ("x", "embedding")}
    loss = negcache.CacheClassificationLoss(
        "embedding", ("x",), scale=SCALE, estimator="exact_query"
    )
    return negcache.CacheLossHandler(negcache.CacheManager(specs, 4), loss, "embedding", ("x",))


def item_network(features):
    return features["x"]


def two_steps(handler, rows, query, positive):
    """Fill the cache with `rows`; return the next step's loss."""
    handler.update_cache_and_compute_loss(item_network, query, rows, {"x": rows})
    return handler.update_cache_and_compute_loss(item_network, query, positive, {"x": positive})


def in_numpy():
    import negcache_core as negcache

    return two_steps(handler_of(negcache), ROWS, QUERY, POSITIVE), None


def in_torch():
    import negcache_torch as negcache
    import torch

    query = torch.tensor(QUERY, requires_grad=True)
    loss = two_steps(handler_of(negcache), torch.tensor(ROWS), query, torch.tensor(POSITIVE))
    loss.backward()
    return loss.item(), query.grad.numpy()


def in_tensorflow():
    import negcache_tensorflow as negcache
    import tensorflow as tf

    query = tf.Variable(QUERY)
    with tf.GradientTape() as tape:
        loss = two_steps(
            handler_of(negcache), tf.constant(ROWS), tf.convert_to_tensor(query), POSITIVE
        )
    return float(loss), tape.gradient(loss, query).numpy()


def in_jax():
    import jax
    import negcache_jax as negcache

    handler = handler_of(negcache)

    def loss_of(query):
        state = handler.init(jax.random.key(0))
        for items in (ROWS, POSITIVE):
            loss, state = handler.update_cache_and_compute_loss(
                state, item_network, query, jax.numpy.asarray(items), {"x": items}
            )
        return loss

    loss, gradient = jax.value_and_grad(loss_of)(jax.numpy.asarray(QUERY))
    return float(loss), np.asarray(gradient)


STEPS = {"torch": in_torch, "tensorflow": in_tensorflow, "jax": in_jax}


def check(step):
    """Raise AssertionError unless a step's loss and gradient are those of the closed form."""
    (loss, gradient), (exact_loss, exact_gradient) = step(), closed_form()
    np.testing.assert_allclose(loss, exact_loss, rtol=1e-5)
    if gradient is not None:
        np.testing.assert_allclose(gradient, exact_gradient, rtol=1e-4, atol=1e-6)
    return loss


def main(wanted):
    print(f"numpy: loss {check(in_numpy):.6f}")
    for name, step in STEPS.items():
        if name in wanted or (not wanted and importlib.util.find_spec(name)):
            print(f"{name}: loss {check(step):.6f}")
        else:
            print(f"{name}: left out")


if __name__ == "__main__":
    main(sys.argv[1:])
