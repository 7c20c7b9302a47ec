"""in_chunks in TensorFlow: what its networks are made of, and what cannot be computed again."""

import functools

import keras
import negcache_tensorflow as negcache
import numpy as np
import pytest
import tensorflow as tf

ROWS, WIDTH, SIZE = 7, 3, 2


def random_rows(rows=ROWS, seed=0):
    return tf.constant(np.random.default_rng(seed).standard_normal((rows, WIDTH)))


def tape_inside(loss_of, x, variables):
    with tf.GradientTape() as tape:
        tape.watch(x)
        loss = loss_of(x)
    return tape.gradient(loss, [x, *variables])


def tape_outside(loss_of, x, variables):
    return tape_inside(tf.function(loss_of), x, variables)


def traced(loss_of, x, variables):
    return tf.function(lambda x: tape_inside(loss_of, x, variables))(x)


def of_unknown_size(loss_of, x, variables):
    signature = [tf.TensorSpec([None, WIDTH], x.dtype)]
    function = tf.function(lambda x: tape_inside(loss_of, x, variables), input_signature=signature)
    return function(x)


WAYS = (tape_inside, tape_outside, traced, of_unknown_size)


def gradients_of(way, network, size, variables, x):
    network = network if size is None else negcache.in_chunks(network, size)
    found = way(lambda x: tf.reduce_sum(network(x) ** 2), x, variables)
    return [tf.convert_to_tensor(each).numpy() for each in found]


def assert_close(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-12)


def of_keras():
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(4, "tanh", dtype="float64") for _ in range(2)]
    model = keras.Sequential([keras.Input((WIDTH,), dtype="float64"), *layers])
    return model, model.trainable_variables


def of_a_table():
    table = tf.Variable(np.random.default_rng(1).standard_normal((5, WIDTH)))
    return lambda x: tf.sin(x * tf.gather(table, tf.cast(tf.abs(x[:, 0]), tf.int32))), [table]


def of_a_branch():
    """What AutoGraph converts, in a function that TensorFlow and not AutoGraph calls."""
    weights = tf.Variable(np.random.default_rng(2).standard_normal((WIDTH, 2)))

    def network(x):
        count = 0
        while count < tf.cast(tf.reduce_sum(weights) + 10.0, tf.int32):
            count += 1
        return tf.tanh(x @ weights) * tf.cast(count, x.dtype)

    return network, [weights]


def of_a_loop():
    weights = tf.Variable(np.random.default_rng(3).standard_normal((WIDTH, WIDTH)))

    def network(x):
        return tf.while_loop(
            lambda count, _: count < 3,
            lambda count, x: (count + 1, tf.tanh(x @ weights)),
            (0, x),
        )[1]

    return network, [weights]


def of_a_function():
    network, variables = of_keras()
    return tf.function(network), variables


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("make", [of_keras, of_a_table, of_a_branch, of_a_loop, of_a_function])
def test_gradients_reach_variables_however_the_network_is_written(make, way):
    network, variables = make()
    whole = gradients_of(tape_inside, network, None, variables, random_rows())
    for size in (SIZE, ROWS):
        assert_close(gradients_of(way, network, size, variables, random_rows()), whole)


@pytest.mark.parametrize("wrap", [lambda function: function, tf.function], ids=["plain", "traced"])
@pytest.mark.parametrize("way", WAYS)
def test_gradients_reach_what_was_computed_from_variables_before(way, wrap):
    weights = tf.Variable(np.random.default_rng(1).standard_normal((WIDTH, 2)))

    def loss_of(x, size=SIZE):
        product = weights * 2.0
        network = wrap(lambda x: tf.tanh(x @ product))
        return tf.reduce_sum(negcache.in_chunks(network, size)(x) ** 2)

    whole = tape_inside(lambda x: loss_of(x, ROWS), random_rows(), [weights])
    assert_close(way(loss_of, random_rows(), [weights]), whole)


def test_the_gradient_of_a_table_stays_sparse_in_eager_code():
    table = tf.Variable(tf.ones((50, WIDTH)))
    ids = tf.constant([1, 1, 4, 7, 7])
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(negcache.in_chunks(lambda ids: tf.gather(table, ids), SIZE)(ids))
    gradient = tape.gradient(loss, table)
    assert isinstance(gradient, tf.IndexedSlices)
    np.testing.assert_array_equal(np.sort(gradient.indices), ids)


def test_frozen_variables_learn_nothing():
    weights = tf.Variable(tf.ones((WIDTH, 2), tf.float64), trainable=False)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(negcache.in_chunks(lambda x: x @ weights, SIZE)(random_rows()))
    assert tape.watched_variables() == ()
    assert tape.gradient(loss, weights) is None


def draws(x):
    return tf.nn.dropout(x, 0.5)


def draws_in_a_branch(x):
    return tf.cond(tf.reduce_sum(x * x) >= 0.0, lambda: draws(x), lambda: x)


def draws_in_a_function():
    function = tf.function(draws, input_signature=[tf.TensorSpec([None, WIDTH], tf.float64)])
    function(random_rows())  # traced before, and not again
    return function


def draws_from_a_generator():
    generator = tf.random.Generator.from_seed(0)
    return lambda x: x * generator.normal((), dtype=x.dtype)


NOT_REPEATED = {
    "tf.nn.dropout": (lambda: draws, "draws random numbers"),
    "in a function": (draws_in_a_function, "draws random numbers"),
    "in a branch": (lambda: draws_in_a_branch, "draws random numbers"),
    "generator": (draws_from_a_generator, "draws random numbers"),
    "keras dropout": (lambda: _in_training(keras.layers.Dropout(0.5)), "writes a variable"),
    "batch norm": (lambda: _in_training(keras.layers.BatchNormalization()), "writes a variable"),
}


def _in_training(layer):
    return lambda x: layer(x, training=True)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NOT_REPEATED)
def test_what_would_not_be_the_same_again_is_refused(name, way):
    make, words = NOT_REPEATED[name]
    network = make()
    with pytest.raises(negcache.OptionError, match=f"the network {words}"):
        gradients_of(way, network, SIZE, [], random_rows())


def test_nothing_is_refused_where_no_gradient_is_taken():
    assert negcache.in_chunks(draws, SIZE)(random_rows()).shape == (ROWS, WIDTH)
    dropout = keras.layers.Dropout(0.5)
    with tf.GradientTape():
        negcache.in_chunks(lambda x: dropout(x, training=False), SIZE)(random_rows())


@pytest.mark.parametrize("way", WAYS)
def test_a_seed_for_each_row_makes_the_masks_those_of_the_whole_batch(way):
    weights = tf.Variable(np.random.default_rng(1).standard_normal((WIDTH, WIDTH)))
    seeds = tf.stack([tf.range(ROWS), tf.range(ROWS) + 5], axis=1)

    def loss_of(x, size=SIZE):
        def network(rows):
            drawn = tf.map_fn(
                lambda seed: tf.random.stateless_uniform((WIDTH,), seed),
                rows["seed"],
                fn_output_signature=tf.float32,
            )
            return tf.cast(drawn < 0.5, tf.float64) * (rows["x"] @ weights)

        return tf.reduce_sum(negcache.in_chunks(network, size)({"x": x, "seed": seeds}) ** 2)

    whole = tape_inside(lambda x: loss_of(x, ROWS), random_rows(), [weights])
    assert_close(way(loss_of, random_rows(), [weights]), whole)


def test_a_forgotten_stop_gradient_is_seen_through_chunks():
    weights, x = tf.Variable(tf.ones((WIDTH, WIDTH))), tf.ones((ROWS, WIDTH))
    item_network = negcache.in_chunks(lambda features: features["x"] @ weights, SIZE)
    loss_fn = negcache.NegativeCacheLoss(32, {"x": x}, WIDTH)
    with tf.GradientTape():
        items = item_network({"x": x})
        loss_fn(item_network, x, items, {"x": x})
        with pytest.raises(negcache.OptionError, match="the positives carry no gradient"):
            loss_fn(item_network, x, tf.stop_gradient(items), {"x": x})


@pytest.mark.parametrize("jit_compile", [False, True])
def test_one_trace_of_a_whole_step_serves_every_batch_size(jit_compile):
    weights = tf.Variable(np.random.default_rng(1).standard_normal((WIDTH, WIDTH)))
    losses = [
        negcache.NegativeCacheLoss(32, {"x": random_rows()}, random_rows(), generator=0)
        for _ in range(2)
    ]

    def plain(features):
        return tf.tanh(features["x"] @ weights)

    def step(loss_fn, network, x):
        with tf.GradientTape() as tape:
            loss = loss_fn(network, x, network({"x": x}), {"x": x})
        return loss, tape.gradient(loss, weights)

    whole, chunked = (
        tf.function(
            functools.partial(step, loss_fn, network),
            input_signature=[tf.TensorSpec([None, WIDTH], tf.float64)],
            jit_compile=jit_compile,
        )
        for loss_fn, network in zip(losses, (plain, negcache.in_chunks(plain, SIZE)), strict=True)
    )
    for rows in (7, 4, 1, 7):
        x = random_rows(rows, rows)
        for ours, theirs in zip(chunked(x), whole(x), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)
    assert chunked.experimental_get_tracing_count() == 1
    for key, rows in losses[0].cache.data.items():
        np.testing.assert_allclose(losses[1].cache.data[key], rows, rtol=1e-9, err_msg=key)
    np.testing.assert_array_equal(losses[1].cache.age, losses[0].cache.age)
