"""What is TensorFlow's own: variables, tracing, checkpoints, summaries, and no global switch."""

import negcache_tensorflow as negcache
import numpy as np
import programs
import pytest
import tensorflow as tf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

WIDTH = 4


def handler_of(capacity=8, *, generator=0, scale=None, use_lru=True, **options):
    specs = {
        "tokens": tf.io.FixedLenFeature([3], tf.int64),
        "embedding": tf.io.FixedLenFeature([WIDTH], tf.float32),
    }
    return negcache.CacheLossHandler(
        negcache.CacheManager(specs, capacity, use_lru),
        negcache.CacheClassificationLoss(
            "embedding", ("tokens",), scale=scale, generator=generator, **options
        ),
        embedding_key="embedding",
        data_keys=("tokens",),
    )


def table_of():
    return tf.Variable(np.random.default_rng(0).standard_normal((20, WIDTH)).astype(np.float32))


def network_of(table):
    return lambda features: tf.reduce_mean(tf.gather(table, features["tokens"]), 1)


def batch(seed, rows=3):
    rng = np.random.default_rng(seed)
    tokens = tf.constant(rng.integers(0, 20, (rows, 3)))
    return tf.constant(rng.standard_normal((rows, WIDTH)), tf.float32), tokens


def step_of(handler, table):
    network = network_of(table)

    def step(query, tokens):
        features = {"tokens": tokens}
        with tf.GradientTape() as tape:
            loss = handler.update_cache_and_compute_loss(
                network, query, network(features), features
            )
        return loss, tf.convert_to_tensor(tape.gradient(loss, table))

    return step


def state_of(handler):
    return [handler.cache.age.numpy(), *(value.numpy() for value in handler.cache.data.values())]


SIGNATURE = [tf.TensorSpec([None, WIDTH], tf.float32), tf.TensorSpec([None, 3], tf.int64)]


@pytest.mark.parametrize("jit_compile", [False, True], ids=["graph", "xla"])
def test_one_trace_serves_every_batch_size_and_agrees_with_eager(jit_compile):
    """XLA draws other random numbers; first in, first out, the state does not depend on them."""
    sides, traces = [], []
    for traced in (False, True):
        handler = handler_of(scale=1.5, use_lru=not jit_compile)
        step = step_of(handler, table_of())
        if traced:

            def counted(query, tokens, step=step):
                traces.append(1)
                return step(query, tokens)

            step = tf.function(counted, input_signature=SIGNATURE, jit_compile=jit_compile)
        history = []
        for seed, rows in enumerate((3, 5, 0, 2, 4)):
            loss, gradient = step(*batch(seed, rows))
            history += [loss.numpy(), *(np.array(value) for value in state_of(handler))]
            history += [] if jit_compile else [gradient.numpy()]
        sides.append(history)
    assert len(traces) == 1
    for ours, theirs in zip(*sides, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("jit_compile", [False, True], ids=["graph", "xla"])
def test_a_traced_step_streams_many_tiles_with_known_sizes(jit_compile):
    """300 slots in tiles of 128: the fold must lose no static size, and leave the same state."""
    sides = []
    for traced in (False, True):
        handler = handler_of(300, use_lru=False, tile_bytes=1)
        step = step_of(handler, table_of())
        step = tf.function(step, jit_compile=jit_compile) if traced else step
        losses = [step(*batch(seed, 100))[0].numpy() for seed in range(4)]
        sides.append([np.asarray(losses), *state_of(handler)])
    assert (sides[0][0][1:] > 0).all()
    for ours, theirs in zip(*sides, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_state_is_in_variables_and_none_of_them_is_trained():
    scale = tf.Variable(2.0)
    handler = handler_of(scale=scale)
    assert {variable.name for variable in handler.variables} >= {
        "cache/age:0",
        "cache/tokens:0",
        "cache/embedding:0",
    }
    assert [variable is scale for variable in handler.trainable_variables] == [True]


def test_checkpoint_round_trip(tmp_path):
    """Save to files, restore in a new handler, go on: bit for bit as if never stopped."""
    table, handler = table_of(), handler_of()
    step = step_of(handler, table)
    for seed in range(4):
        step(*batch(seed))
    path = tf.train.Checkpoint(handler=handler).save(str(tmp_path / "checkpoint"))
    resumed = handler_of(generator=99)
    status = tf.train.Checkpoint(handler=resumed).restore(path)
    status.assert_consumed()
    resumed_step = step_of(resumed, table)
    for seed in range(4, 8):
        ours, theirs = resumed_step(*batch(seed)), step(*batch(seed))
        np.testing.assert_array_equal(ours[0], theirs[0])
        for mine, other in zip(state_of(resumed), state_of(handler), strict=True):
            np.testing.assert_array_equal(mine, other)


@pytest.mark.parametrize("traced", [False, True])
def test_summaries_are_the_published_ones_and_all_metrics(tmp_path, traced):
    handler = handler_of()
    step = step_of(handler, table_of())
    step = tf.function(step) if traced else step
    step(*batch(0))  # without a writer: nothing is written and nothing fails
    twin = handler_of()
    step_of(twin, table_of())(*batch(0))
    step_of(twin, table_of())(*batch(1))
    with tf.summary.create_file_writer(str(tmp_path)).as_default(step=7):
        step = tf.function(step_of(handler, table_of())) if traced else step
        loss, _ = step(*batch(1))
    accumulator = EventAccumulator(str(tmp_path)).Reload()
    scalars = {}
    for tag in accumulator.Tags()["tensors"]:
        (event,) = accumulator.Tensors(tag)  # each once
        assert event.step == 7
        scalars[tag] = float(tf.make_ndarray(event.tensor_proto))
    expected = {f"cache/{name}": float(value) for name, value in twin.metrics.items()}
    expected["cache/interpretable_prediction_loss"] = float(loss)
    assert {"cache/fill", "cache/effective_negatives", "cache/staleness"} <= set(expected)
    assert scalars == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_metrics_are_kept_in_eager_code_and_no_traced_tensor_leaks():
    handler = handler_of()
    step = step_of(handler, table_of())
    tf.function(step)(*batch(0))
    assert handler.metrics == {}
    step(*batch(1))
    assert float(handler.metrics["fill"]) == pytest.approx(3 / 8)


def test_generators_follow_the_frameworks_seed():
    def draw(generator):
        function = negcache.GumbelMaxRetrievalFn(generator=generator)
        return function(tf.zeros((16, 50))).numpy()

    tf.random.set_seed(1)
    first = draw(None)
    tf.random.set_seed(1)
    np.testing.assert_array_equal(draw(None), first)
    assert (draw(None) != first).any()
    np.testing.assert_array_equal(
        draw(tf.random.Generator.from_seed(3)), draw(tf.random.Generator.from_seed(3))
    )
    with pytest.raises(negcache.KindError, match=r"or a tf\.random\.Generator"):
        draw(0.5)


def test_no_global_switch_is_thrown():
    """With NumPy behaviour on, an int and a float tensor would be promoted instead of refused."""
    with pytest.raises(tf.errors.InvalidArgumentError):
        _ = tf.constant(1) + tf.constant(1.0)
    assert not hasattr(tf.constant(1.0), "astype")


def test_python_control_flow_of_the_users_network_is_still_converted():
    """AutoGraph must reach the item network through the handler."""
    handler, table = handler_of(), table_of()

    def network(features):
        rows = tf.gather(table, features["tokens"])
        if tf.reduce_sum(rows) > 0:  # noqa: SIM108 - a branch on a tensor is the point
            rows = rows * 2.0
        else:
            rows = rows * 3.0
        return tf.reduce_mean(rows, 1)

    @tf.function
    def step(query, tokens):
        return handler.update_cache_and_compute_loss(
            network, query, network({"tokens": tokens}), {"tokens": tokens}
        )

    for seed in range(2):
        assert np.isfinite(step(*batch(seed)))


TAPED = """
import resource
import tensorflow as tf
import negcache_tensorflow as negcache

rows, slots = 64, 2**18
scale = tf.Variable(1.0)
loss = negcache.CacheClassificationLoss("e", ("e",), scale=scale, generator=0)
cache = negcache.NegativeCache({"e": tf.random.normal((slots, 8))}, tf.zeros(slots, tf.int32))
queries = tf.random.normal((rows, 8))
loss.retrieve(queries, cache)  # the first call's own needs
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with tf.GradientTape() as tape:
    loss.retrieve(queries, cache)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
matrix = rows * slots * 4 // 1024
assert grown < matrix / 4, (grown, matrix)
"""


def test_a_tape_that_watches_the_scale_keeps_no_tiles():
    """In kilobytes of resident memory, in a process of its own."""
    programs.run("-c", TAPED)


@pytest.mark.parametrize("use_lru", [True, False])
def test_a_traced_step_that_fails_changes_nothing(use_lru):
    """A graph runs what it can: no write may come before what may fail, whatever it depends on."""
    handler, table = handler_of(use_lru=use_lru), table_of()
    network, fails = network_of(table), tf.Variable(initial_value=False)

    def asserting(features):
        with tf.control_dependencies([tf.debugging.Assert(~fails, ["the tower failed"])]):
            return network(features) + 0.0

    @tf.function
    def step(query, tokens):
        features = {"tokens": tokens}
        return handler.update_cache_and_compute_loss(asserting, query, network(features), features)

    step(*batch(0))
    before = state_of(handler)
    fails.assign(value=True)
    with pytest.raises(tf.errors.InvalidArgumentError, match="the tower failed"):
        step(*batch(1))
    for ours, theirs in zip(state_of(handler), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_traced_refresh_that_fails_for_one_cache_changes_none():
    specs = {"x": negcache.FieldSpec((1,), "float32"), "e": negcache.FieldSpec((1,), "float32")}
    handler = negcache.MultiCacheLossHandler(
        {name: negcache.CacheManager(specs, 2) for name in "ab"},
        negcache.CacheClassificationLoss("e", ("x",), generator=0),
        embedding_key="e",
        data_keys=("x",),
    )
    x = tf.constant([[1.0], [-2.0]])
    handler.prefill(lambda features: features["x"], {"a": {"x": -x}, "b": {"x": x}}, 2)

    def network(features):
        positive = tf.debugging.Assert(tf.reduce_sum(features["x"]) > 0, ["the tower failed"])
        with tf.control_dependencies([positive]):
            return 7.0 * features["x"]

    with pytest.raises(tf.errors.InvalidArgumentError, match="the tower failed"):
        tf.function(lambda: handler.refresh(network, 2))()
    np.testing.assert_array_equal(handler.cache["a"].data["e"], -x)
    np.testing.assert_array_equal(handler.cache["b"].data["e"], x)


def test_zeros_of_no_rows_do_not_end_the_process():
    """TensorFlow's optimizer of graphs divides by the number of rows of tf.zeros_like's product."""
    rows, column = tf.zeros((0, 3)), tf.zeros((0,))

    @tf.function(autograph=False)
    def product(rows, column):
        zeros = negcache.CacheManager.backend.xp.zeros_like(rows)
        assert zeros.shape == rows.shape
        return zeros * column[:, None]

    assert product(rows, column).shape == (0, 3)
