"""matryoshka_dims at the front door: in print, in files, traced, in evaluation, and refused."""

import functools

import jax
import negcache_jax
import negcache_tensorflow
import numpy as np
import pytest
import tensorflow as tf
from backends import BACKENDS, EAGER

import negcache_core as negcache

SLOTS, D, ROWS = 200, 6, 5
TOKENS = np.zeros((3, 2), np.int64)
DIMS, WEIGHTS = (2, 6, 3), (0.5, 1.0, 2.0)


def batch(seed, rows=ROWS):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((rows, D)), rng.standard_normal((rows, D))


def made(backend, **options):
    seeded = {} if backend.hold is not None else {"generator": 3}
    options = {"matryoshka_dims": DIMS, "matryoshka_weights": WEIGHTS, "scale": 3.0, **options}
    example = backend.native({"x": np.zeros((ROWS, D))})
    loss_fn = backend.module.NegativeCacheLoss(
        SLOTS, example, backend.to_native(np.zeros((ROWS, D))), **options, **seeded
    )
    return loss_fn if backend.hold is None else backend.hold(loss_fn, 3)


def step(backend, loss_fn, seed, **options):
    query, x = backend.native(batch(seed))
    return loss_fn(lambda features: features["x"] * 2.0, query, x * 2.0, {"x": x}, **options)


def losses_by_hand(query, positive, rows, scale=3.0):
    """Return the mean of the weighted sum of full losses, the batch's other positives included."""
    total = 0.0
    for width, weight in zip(DIMS, WEIGHTS, strict=True):
        q, p, c = (
            each[:, :width] / np.linalg.norm(each[:, :width], axis=1, keepdims=True)
            for each in (query, positive, rows)
        )
        scores = np.concatenate([scale * q @ p.T, scale * q @ c.T], axis=1)
        own = np.diagonal(scores)
        total = total + weight * (np.log(np.exp(scores).sum(axis=1)) - own)
    return total.mean()


@pytest.mark.parametrize("name", EAGER)
def test_a_step_an_evaluation_and_what_print_says(name):
    backend = BACKENDS[name]
    loss_fn = made(backend)
    rows = np.zeros((0, D))
    for seed in range(3):
        given = float(backend.to_numpy(step(backend, loss_fn, seed)))
        query, x = batch(seed)
        assert given == pytest.approx(losses_by_hand(query, 2.0 * x, rows), rel=1e-12)
        rows = np.concatenate([rows, 2.0 * x])
        assert float(backend.to_numpy(loss_fn.metrics["staleness"])) < 1e-10
    query, x = batch(9)
    value = step(backend, loss_fn, 9, training=False)
    assert float(backend.to_numpy(value)) == pytest.approx(losses_by_hand(query, 2 * x, rows))
    words = str(loss_fn)
    assert "matryoshka_dims 2 and 3 and 6, matryoshka_weights 0.5 and 2.0 and 1.0" in words
    assert "estimator exact_query" in words
    assert "weights" not in str(made(backend, matryoshka_weights=None))


@pytest.mark.parametrize("name", EAGER)
def test_a_file_is_the_same_with_and_without(name, tmp_path):
    backend, files = BACKENDS[name], []
    for number, dims in enumerate((DIMS, None)):
        more = {} if dims else {"matryoshka_dims": None, "matryoshka_weights": None}
        loss_fn = made(backend, **more)
        step(backend, loss_fn, 0)
        files.append(tmp_path / str(number))
        loss_fn.save(files[-1])
    for file, dims in ((files[1], DIMS), (files[0], (4,))):
        other = made(backend, matryoshka_dims=dims, matryoshka_weights=None)
        other.load(file)
        assert "5 written" in str(other)
        step(backend, other, 1)


def test_tf_function_and_jit_take_the_steps_of_eager_code():
    def network(features):
        return features["x"] * 2.0

    loss_fn = made(BACKENDS["tensorflow"])
    eager = []
    for seed in range(2):
        query, x = map(tf.constant, batch(seed))
        with tf.GradientTape() as tape:
            tape.watch(query)
            loss = loss_fn(network, query, x * 2.0, {"x": x})
        eager.append((float(loss), tape.gradient(loss, query).numpy()))

    loss_fn = made(BACKENDS["tensorflow"])

    @functools.partial(tf.function, input_signature=[tf.TensorSpec([None, D], tf.float64)] * 2)
    def traced(query, x):
        return loss_fn(network, query, x * 2.0, {"x": x})

    assert negcache_tensorflow is BACKENDS["tensorflow"].module
    found = [float(traced(*map(tf.constant, batch(seed)))) for seed in range(2)]
    np.testing.assert_allclose(found, [loss for loss, _ in eager], rtol=1e-12)

    loss_fn = negcache_jax.NegativeCacheLoss(
        SLOTS,
        {"x": np.zeros((ROWS, D))},
        np.zeros((ROWS, D)),
        scale=3.0,
        matryoshka_dims=DIMS,
        matryoshka_weights=WEIGHTS,
    )

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def compiled(query, state, x):
        return loss_fn(state, network, query, x * 2.0, {"x": x})

    state = loss_fn.init(jax.random.key(0))
    for seed, (loss, gradient) in enumerate(eager):
        query, x = map(jax.numpy.asarray, batch(seed))
        (found, state), slope = compiled(query, state, x)
        np.testing.assert_allclose(found, loss, rtol=1e-12)
        # No row is stale, so the readout is the query's whole gradient, whatever was drawn.
        np.testing.assert_allclose(slope, gradient, rtol=1e-9, atol=1e-12)


REFUSED = [
    ({"matryoshka_dims": 64}, negcache.KindError, "expected several numbers"),
    ({"matryoshka_dims": "64"}, negcache.KindError, "expected several numbers"),
    ({"matryoshka_dims": ()}, negcache.OptionError, "distinct positive ints"),
    ({"matryoshka_dims": (2, 2)}, negcache.OptionError, "distinct positive ints"),
    ({"matryoshka_dims": (0, 2)}, negcache.OptionError, "distinct positive ints"),
    ({"matryoshka_dims": (-1,)}, negcache.OptionError, "distinct positive ints"),
    ({"matryoshka_dims": (2.0,)}, negcache.OptionError, "distinct positive ints"),
    ({"matryoshka_dims": (True,)}, negcache.OptionError, "distinct positive ints"),
    ({"matryoshka_dims": (2, 5)}, negcache.ShapeError, "has 5, but embeddings are 4 wide"),
    ({"matryoshka_weights": (1.0,)}, negcache.OptionError, "there are no matryoshka_dims"),
    ({"matryoshka_weights": 1.0, "matryoshka_dims": (2,)}, negcache.KindError, "several numbers"),
    ({"matryoshka_weights": (1, 1), "matryoshka_dims": (2,)}, negcache.OptionError, "each of them"),
    ({"matryoshka_weights": (0,), "matryoshka_dims": (2,)}, negcache.OptionError, "above 0"),
    ({"matryoshka_weights": ("a",), "matryoshka_dims": (2,)}, negcache.KindError, "a number"),
    (
        {"matryoshka_weights": (float("nan"),), "matryoshka_dims": (2,)},
        negcache.OptionError,
        "finite number",
    ),
    ({"matryoshka_dims": (2,), "top_k": 2}, negcache.OptionError, "do not work with top_k"),
    ({"matryoshka_dims": (2,), "estimator": "paper"}, negcache.OptionError, "'paper'"),
    ({"matryoshka_dims": (2,), "score_transform": np.tanh}, negcache.OptionError, "transform"),
    (
        {"matryoshka_dims": (2,), "retrieval_fn": negcache.MaxScoreRetrievalFn()},
        negcache.OptionError,
        "do not work with retrieval_fn",
    ),
]


@pytest.mark.parametrize(("options", "error", "words"), REFUSED)
def test_what_cannot_work_is_refused_in_words(options, error, words):
    with pytest.raises(error, match=words):
        negcache.NegativeCacheLoss(8, {"tokens": TOKENS}, 4, **options)


def test_a_width_beyond_the_cache_is_refused_where_it_is_first_known():
    loss = negcache.CacheClassificationLoss("e", ("x",), estimator="shared", matryoshka_dims=(2, 9))
    rows = np.ones((3, 4))
    cache = negcache.NegativeCache({"e": rows, "x": rows}, np.zeros(3, np.int32))
    with pytest.raises(negcache.ShapeError, match="has 9, but embeddings are 4 wide"):
        loss.retrieve(rows, cache)
    specs = {key: negcache.FieldSpec((4,), "float32") for key in ("e", "x")}
    with pytest.raises(negcache.ShapeError, match="has 9, but embeddings are 4 wide"):
        negcache.CacheLossHandler(negcache.CacheManager(specs, 3), loss)


def test_a_retrieval_of_another_loss_is_refused():
    rows = np.ones((3, 4))
    cache = negcache.NegativeCache({"e": rows, "x": rows}, np.zeros(3, np.int32))
    ours, plain = (
        negcache.CacheClassificationLoss(
            "e", ("x",), estimator="shared", matryoshka_dims=dims, generator=0
        )
        for dims in ((2, 4), None)
    )
    for one, other, words in ((ours, plain, "has by_width"), (plain, ours, "has no by_width")):
        with pytest.raises(negcache.OptionError, match=words):
            other.loss_from_negatives(rows, rows, rows, one.retrieve(rows, cache))
