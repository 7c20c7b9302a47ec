"""Replicas of tf.distribute: a cache in shards is the one big cache, in loss, gradient and state.

Every test runs this file in processes of its own, as devices are set up before TensorFlow starts.
All cases on virtual devices run in one: they share its start and what AutoGraph has converted.
"""

import functools
import json
import os
import socket
import subprocess
import sys

import negcache_tensorflow as negcache
import numpy as np
import programs
import pytest
import tensorflow as tf

from negcache_core.sharding.replicas import Route

REPLICAS, ROWS, CAPACITY, WIDTH = 3, 2, 9, 3
OPTIONS = {
    "paper": {"estimator": "paper"},
    "shared": {"estimator": "shared", "id_key": "id", "in_batch_negatives": True},
    "exact_query": {"estimator": "exact_query", "log_frequency_key": "log_q"},
    "num_samples": {
        "estimator": "exact_query",
        "num_samples": 2,
        "in_batch_negatives": True,
        "id_key": "id",
        "staleness_correction": True,
    },
    "top_k": {"estimator": "shared", "top_k": 4, "id_key": "id"},
    "rules": {
        "estimator": "exact_query",
        "id_keys": ("id", "big"),
        "margin": 0.5,
        "in_batch_negatives": True,
    },
    "group": {"estimator": "shared", "group_key": "id", "margin": -0.1},
}
SPECS = {
    "x": negcache.FieldSpec((2,), "float64"),
    "id": negcache.FieldSpec((), "int64"),
    "log_q": negcache.FieldSpec((), "float64"),
    "half": negcache.FieldSpec((2,), "bfloat16"),
    "big": negcache.FieldSpec((), "uint64"),
    "embedding": negcache.FieldSpec((WIDTH,), "float64"),
}
PLAIN = {key: spec for key, spec in SPECS.items() if key not in ("half", "big")}


def batch(step, rows, draws=1):
    rng = np.random.default_rng(step)
    return {
        "y": rng.normal(size=(rows, 2)),
        "x": rng.normal(size=(rows, 2)),
        "id": rng.integers(2**40, 2**40 + 5, rows),
        "log_q": rng.normal(size=rows),
        "half": rng.normal(size=(rows, 2)).astype(tf.bfloat16.as_numpy_dtype),
        "big": rng.integers(0, 9, rows).astype(np.uint64) + np.uint64(2**63),
        "weight": rng.random(rows) * 2,
        "noise": rng.random((rows, draws, 2)),
    }


def part(whole, rank, count=REPLICAS):
    return {key: np.split(value, count)[rank] for key, value in whole.items()}


def parameters():
    rng = np.random.default_rng(1)
    return [
        *(tf.Variable(rng.normal(size=(2, WIDTH))) for _ in range(2)),
        tf.Variable(np.float64(1.5)),
    ]


def handler_of(scale, options, capacity=CAPACITY, *, specs=SPECS, sharded=True, **more):
    kind = "DistributedCacheClassificationLoss" if sharded else "CacheClassificationLoss"
    return negcache.CacheLossHandler(
        negcache.CacheManager(specs, capacity),
        getattr(negcache, kind)("embedding", ("x",), **{"scale": scale, "generator": 5, **options}),
        embedding_key="embedding",
        data_keys=("x",),
        **more,
    )


def whole_handler(scale, options, count, capacity, specs):
    return negcache.MultiCacheLossHandler(
        {str(r): negcache.CacheManager(specs, capacity // count) for r in range(count)},
        negcache.CacheClassificationLoss("embedding", ("x",), scale=scale, **options),
        embedding_key="embedding",
        data_keys=("x",),
    )


def step_of(handler, weights):
    query, item, _ = weights

    def step(given):
        features = {key: given[key] for key in handler.cache_manager.specs if key in given}
        with tf.GradientTape() as tape:
            loss = handler.update_cache_and_compute_loss(
                lambda data: data["x"] @ item,
                given["y"] @ query,
                given["x"] @ item,
                features,
                sample_weight=given["weight"],
                noise=given["noise"],
            )
        return loss, tape.gradient(loss, weights)

    return step


def whole_step(handler, weights, given, count=REPLICAS):
    query, item, _ = weights
    with tf.GradientTape() as tape:
        positives = given["x"] @ item
        result = handler.cache_loss(
            lambda data: data["x"] @ item,
            given["y"] @ query,
            positives,
            handler.cache,
            pos_features={key: given[key] for key in ("x", "id", "big", "log_q")},
            sample_weight=given["weight"],
            noise=given["noise"],
        )
    handler.commit(
        result,
        dict(zip(map(str, range(count)), tf.split(positives, count), strict=True)),
        {
            str(r): {key: part(given, r, count)[key] for key in table.data if key in given}
            for r, table in enumerate(handler.cache.values())
        },
    )
    return result, tape.gradient(result.loss, weights)


def local(strategy, value):
    return [
        np.asarray(tf.convert_to_tensor(each))
        for each in strategy.experimental_local_results(value)
    ]


def values(strategy, whole, count=REPLICAS):
    return strategy.experimental_distribute_values_from_function(
        lambda context: tf.nest.map_structure(
            tf.constant, part(whole, int(context.replica_id_in_sync_group), count)
        )
    )


def close(ours, theirs, what):
    np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-11, err_msg=str(what))


def compare_with_one_process(strategy, options, ranks, specs=SPECS, steps=6, *, autograph=False):
    """Same noise, same parameters: losses, gradients averaged over replicas, and every shard."""
    count, capacity = strategy.num_replicas_in_sync, 3 * strategy.num_replicas_in_sync
    ours, theirs = parameters(), parameters()
    labels = {key: spec for key, spec in specs.items() if key not in ("x", "embedding")}
    given = {"in_batch_negatives": False, **options, "labels": labels, "group": strategy}
    if "id_key" in given:
        given["id_keys"] = (given.pop("id_key"),)
    sharded = negcache.NegativeCacheLoss(
        capacity, {"x": specs["x"]}, specs["embedding"], ours[2], **given
    )
    whole = whole_handler(theirs[2], options, count, capacity, specs)

    @tf.function(autograph=autograph)
    def run(given):
        def replica(given):
            loss, gradients = step_of(sharded, ours)(given)
            context = tf.distribute.get_replica_context()
            return context.all_reduce("MEAN", [loss, *gradients])

        return strategy.run(replica, args=(given,))

    refreshed = 0
    for step in range(steps):
        given = batch(step, ROWS * count, options.get("num_samples", 1))
        mean = run(values(strategy, given, count))
        expected, wanted = whole_step(whole, theirs, given, count)
        for mine, other in zip(mean, [expected.loss, *wanted], strict=True):
            for each in local(strategy, mine):
                close(each, other, (options, step))
        equal_shards(strategy, sharded.cache, [whole.cache[str(rank)] for rank in ranks])
        for mine, other, gradient in zip(ours, theirs, wanted, strict=True):
            for variable in (mine, other):
                variable.assign_sub(0.1 * gradient)
        refreshed += sum(mask.numpy().sum() for mask in expected.updated_item_mask.values())
    assert refreshed > 4, refreshed  # so shards that were not refreshed would have differed
    return sharded


def equal_shards(strategy, cache, wanted):
    for key, table in {**cache.data, "age": cache.age}.items():
        for shard, one in zip(local(strategy, table), wanted, strict=True):
            other = (one.age if key == "age" else one.data[key]).numpy()
            if key == "embedding":
                close(shard, other, key)
            else:
                np.testing.assert_array_equal(shard, other, key)


@functools.cache
def mirrored():
    cpu = tf.config.list_physical_devices("CPU")[0]
    devices = [tf.config.LogicalDeviceConfiguration()] * REPLICAS
    tf.config.set_logical_device_configuration(cpu, devices)
    return tf.distribute.MirroredStrategy([f"CPU:{number}" for number in range(REPLICAS)])


def big_cache(name, conversion="plain"):
    # AutoGraph converts code for longer than all else takes: two cases reach all of the code.
    converted = conversion == "autograph"
    compare_with_one_process(mirrored(), OPTIONS[name], range(REPLICAS), autograph=converted)


def spawn(*cases, environment=None):
    """Start a process that runs cases in turn: a function of this file and its arguments, each."""
    return subprocess.Popen(
        [sys.executable, __file__, *programs.words_of(cases)],
        env={
            **os.environ,
            "TF_CPP_MIN_LOG_LEVEL": "2",
            "PYTHONPATH": os.pathsep.join(sys.path),  # this file imports what tests share
            **(environment or {}),
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(*processes, timeout=550):
    """Wait for processes; one that fails fails the test, and stops the others."""
    try:
        for process in processes:
            _, errors = process.communicate(timeout=timeout)
            assert process.returncode == 0, errors[-8000:]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def verbs():
    """Values that are not finite stay where they are, dtypes keep their bits, gradients add up."""
    strategy = mirrored()
    with strategy.scope():
        replicas = handler_of(None, {}).cache_loss.replicas
    extremes = np.asarray([[-np.inf, 1.0], [np.nan, 2.0], [0.5, np.inf]])
    typed = [
        np.asarray([1, 0, 1], bool),
        np.asarray([-128, 127, 3], np.int8),
        np.asarray([2**32 - 1, 0, 1], np.uint32),
        np.asarray([-(2**63), 2**63 - 1, 5], np.int64),
        np.asarray([2**64 - 1, 2**63, 7], np.uint64),
        np.asarray([1.5, -np.inf, 3.0], tf.bfloat16.as_numpy_dtype),
    ]

    @tf.function
    def run():
        def replica():
            rank = tf.distribute.get_replica_context().replica_id_in_sync_group
            gathered = replicas.gather([tf.constant(each)[rank][None] for each in typed], (1,) * 3)
            # Replica r owns the draw of replica r + 1; what it has for the others must not leak.
            owner = tf.constant([2, 0, 1], tf.int64)
            rows = tf.where((owner == replicas.rank)[:, None], extremes, np.nan)
            route = Route(owner, replicas.entries(owner), (1,) * 3)
            (served,) = replicas.serve([rows], route)
            own = tf.cast(rank + 1, tf.float64)[None]
            with tf.GradientTape() as tape:
                tape.watch(own)
                every = replicas.gather_fresh(own, (1,) * 3)
                value = tf.reduce_sum(every * every) * tf.cast(rank + 1, tf.float64)
            return gathered, served, tape.gradient(value, own)

        return strategy.run(replica)

    gathered, served, gradient = run()
    for wanted, found in zip(typed, gathered, strict=True):
        for each in local(strategy, found):
            np.testing.assert_array_equal(each, wanted)
    np.testing.assert_array_equal(np.concatenate(local(strategy, served)), extremes)
    # Of (1 + 2 + 3) times the sum of squares of 1, 2 and 3.
    np.testing.assert_array_equal(np.concatenate(local(strategy, gradient)), [12, 24, 36])


def own_noise_and_checkpoints(path):
    """Replicas draw unlike negatives, follow the seed, and go on from a checkpoint bit for bit."""
    strategy, weights = mirrored(), parameters()
    everyone = np.repeat(batch(0, 1)["y"], REPLICAS * 8, 0)

    def made(seed):
        with strategy.scope():
            return handler_of(None, {"generator": seed, "num_samples": 4})

    def go(handler, seeds, wrap=lambda function: function):
        run = wrap(lambda given: strategy.run(unnoised, args=(handler, given)))
        return [local(strategy, run(values(strategy, batch(s, ROWS * REPLICAS)))) for s in seeds]

    def unnoised(handler, given):
        return handler.update_cache_and_compute_loss(
            lambda data: data["x"] @ weights[1],
            given["y"] @ weights[0],
            given["x"] @ weights[1],
            {key: given[key] for key in SPECS if key in given},
        )

    def drawn(handler, wrap=lambda function: function):
        """What replicas draw for queries that are all the same, 8 each."""

        @wrap
        def run(given):
            def replica(given):
                features = {"x": tf.zeros((8, 2), tf.float64)}
                return handler.retrieve(given["y"] @ weights[0], features).features["x"]

            return strategy.run(replica, args=(given,))

        return local(strategy, run(values(strategy, {"y": everyone})))

    traced = functools.partial(tf.function, autograph=False)
    first, again, other = made(1), made(1), made(2)
    go(first, range(3), traced)
    for handler in (again, other):
        go(handler, range(3))
    one, two, three = drawn(first, traced)
    assert (one != two).any()
    assert (two != three).any()
    np.testing.assert_array_equal(drawn(again), [one, two, three])
    assert (np.asarray(drawn(other)) != [one, two, three]).any()
    # 96 draws of 9 rows: some are the other shards'.
    assert len({tuple(row) for row in np.concatenate([one, two, three])}) > CAPACITY // REPLICAS

    saved = tf.train.Checkpoint(handler=first).save(f"{path}/checkpoint")
    resumed = made(99)
    tf.train.Checkpoint(handler=resumed).restore(saved).assert_consumed()
    np.testing.assert_array_equal(go(first, (3, 4)), go(resumed, (3, 4)))
    for ours, theirs in zip(first.cache.data.values(), resumed.cache.data.values(), strict=True):
        np.testing.assert_array_equal(local(strategy, ours), local(strategy, theirs))
    shards = local(strategy, first.cache.data["x"])
    assert not np.array_equal(shards[0], shards[1])


def upkeep(kind):
    """Prefill and refresh: of a replica's own shard, or of a whole cache that all replicas have."""
    strategy, corpus = mirrored(), batch(0, CAPACITY)
    shared = kind == "replicated"
    with strategy.scope():
        handler = handler_of(None, {}, sharded=not shared, use_cross_replica=shared)

    def prefill(given):
        features = {key: given[key] for key in SPECS if key in given}
        return handler.prefill(
            lambda data: data["x"] @ tf.ones((2, WIDTH), tf.float64), features, 2
        )

    given = corpus if shared else values(strategy, corpus)
    left_out = strategy.run(prefill, args=(given,))
    assert all(count == 0 for count in local(strategy, left_out))

    @tf.function
    def refresh():
        # Each replica has a network of its own; the first's counts where the cache is shared.
        def replica():
            rank = tf.cast(tf.distribute.get_replica_context().replica_id_in_sync_group, tf.float64)
            return handler.refresh(lambda data: data["x"] @ tf.fill((2, WIDTH), 2 + rank), 2)

        return strategy.run(replica)

    # Of rows of one age the lowest slots are refreshed, and their age stays the lowest there is.
    assert all(count == 0 for count in local(strategy, refresh()))
    for rank in range(REPLICAS):
        rows = corpus["x"] if shared else part(corpus, rank)["x"]
        factors = np.ones(len(rows))
        factors[:2] = 2 + (0 if shared else rank)
        wanted = (rows.sum(1) * factors)[:, None] * np.ones((1, WIDTH))
        close(local(strategy, handler.cache.data["embedding"])[rank], wanted, rank)
        np.testing.assert_array_equal(local(strategy, handler.cache.data["x"])[rank], rows)
        np.testing.assert_array_equal(local(strategy, handler.cache.age)[rank], 0)


def unique():
    """With unique_key an item has one slot in all shards, and its last row counts."""
    strategy, model = mirrored(), {}
    specs = {key: SPECS[key] for key in ("x", "id", "embedding")}
    with strategy.scope():
        handler = negcache.CacheLossHandler(
            negcache.CacheManager(specs, 48, unique_key="id"),
            negcache.DistributedCacheClassificationLoss("embedding", ("x",), generator=0),
            embedding_key="embedding",
            data_keys=("x",),
        )

    @tf.function
    def step(given):
        def replica(given):
            query = given["x"] @ tf.ones((2, WIDTH), tf.float64)
            return handler.update_cache_and_compute_loss(
                lambda data: data["x"] @ tf.ones((2, WIDTH), tf.float64),
                query,
                query,
                {key: given[key] for key in ("x", "id")},
            )

        return strategy.run(replica, args=(given,))

    for number in range(6):
        whole = batch(number, ROWS * REPLICAS)
        step(values(strategy, whole))
        model |= dict(zip(whole["id"].tolist(), whole["x"].tolist(), strict=True))
        ages, *held = (
            np.concatenate(local(strategy, each))
            for each in (handler.cache.age, *(handler.cache.data[key] for key in ("id", "x")))
        )
        held = [each[ages != negcache.EMPTY].tolist() for each in held]
        assert sorted(held[0]) == sorted(model)
        assert dict(zip(*held, strict=True)) == model


def replicated():
    """With use_cross_replica all replicas keep one cache, whatever the dtype of its fields."""
    strategy = mirrored()
    specs = {
        "x": negcache.FieldSpec((2,), "bfloat16"),
        "big": negcache.FieldSpec((), "uint64"),
        "embedding": negcache.FieldSpec((2,), "float32"),
    }
    with strategy.scope():
        handler = negcache.CacheLossHandler(
            negcache.CacheManager(specs, 12),
            negcache.CacheClassificationLoss("embedding", ("x",), generator=0),
            embedding_key="embedding",
            data_keys=("x",),
            use_cross_replica=True,
        )

    @tf.function
    def step(x):
        features = {"x": tf.cast(x, tf.bfloat16), "big": tf.cast(x[:, 0], tf.uint64) + 2**63}
        return handler.update_cache_and_compute_loss(
            lambda features: tf.cast(features["x"], tf.float32), x, x, features
        )

    for number in range(3):
        given = strategy.experimental_distribute_values_from_function(
            lambda context, number=number: tf.fill(
                (2, 2), tf.cast(1 + context.replica_id_in_sync_group + 10 * number, tf.float32)
            )
        )
        losses = strategy.run(step, args=(given,))
    wanted = [11, 11, 12, 12, 13, 13, 21, 21, 22, 22, 23, 23]  # the youngest
    for key, table in {**handler.cache.data, "age": handler.cache.age}.items():
        first, *others = local(strategy, table)
        assert len(others) == REPLICAS - 1
        for other in others:
            np.testing.assert_array_equal(other, first)
        if key == "x":
            assert sorted(first[:, 0]) == wanted, first
        if key == "big":
            assert sorted(first - np.uint64(2**63)) == wanted, first
    assert all(np.isfinite(loss) for loss in local(strategy, losses))


def mistakes():
    """What cannot work says so."""
    strategy = mirrored()
    with strategy.scope():
        with pytest.raises(negcache.CapacityError, match="10 slots cannot be split into 3 equal"):
            handler_of(None, {}, 10)
        handler = handler_of(None, {})
    weights = parameters()
    with pytest.raises(negcache.OptionError, match=r"inside strategy\.scope\(\), and call them"):
        step_of(handler, weights)(batch(0, 2))

    def sized(rows):
        return tf.function(
            lambda: strategy.run(lambda: step_of(handler, weights)(batch(0, rows())))
        )

    def of_rank():
        return 1 + int(
            tf.get_static_value(tf.distribute.get_replica_context().replica_id_in_sync_group)
        )

    with pytest.raises(negcache.ShapeError, match="unequal batches"):
        sized(of_rank)()
    every = batch(0, 2)
    signature = {key: tf.TensorSpec([None, *v.shape[1:]], v.dtype) for key, v in every.items()}
    open_ended = tf.function(
        lambda given: strategy.run(step_of(handler, weights), args=(given,)),
        input_signature=[signature],
    )
    with pytest.raises(negcache.ShapeError, match="drop_remainder=True"):
        open_ended(every)
    for age in local(strategy, handler.cache.age):
        assert (age == negcache.EMPTY).all()
    with pytest.raises(negcache.KindError, match=r"expected a tf\.distribute\.Strategy"):
        negcache.NegativeCacheLoss(9, {"x": SPECS["x"]}, WIDTH, group="data")


def test_shards_are_the_one_big_cache_in_all_that_they_do(tmp_path):
    converted = [("big_cache", name, "autograph") for name in ("num_samples", "top_k")]
    plain = [("big_cache", name) for name in ("paper", "shared", "exact_query")]
    upkeeps = ("upkeep", "sharded"), ("upkeep", "replicated")
    noise = ("own_noise_and_checkpoints", tmp_path)
    others = ("verbs",), noise, *upkeeps, ("unique",), ("replicated",), ("mistakes",)
    finish(spawn(*converted, *plain, *others))


def workers(*each):
    """Start the workers of a cluster on this machine, with the cases of each."""
    sockets = [socket.socket() for _ in each]
    for one in sockets:
        one.bind(("localhost", 0))
    cluster = {"worker": [f"localhost:{one.getsockname()[1]}" for one in sockets]}
    for one in sockets:
        one.close()
    return [
        spawn(
            *cases,
            environment={
                "TF_CONFIG": json.dumps(
                    {"cluster": cluster, "task": {"type": "worker", "index": index}}
                )
            },
        )
        for index, cases in enumerate(each)
    ]


# A process has one of them.
cluster = functools.cache(tf.distribute.MultiWorkerMirroredStrategy)


def worker(index, path):
    strategy = cluster()
    options = OPTIONS["num_samples"]
    sharded = compare_with_one_process(strategy, options, [int(index)], PLAIN, steps=4)
    with strategy.scope(), pytest.raises(negcache.DTypeError, match="half' is bfloat16"):
        handler_of(None, {}, 6, specs={"half": SPECS["half"], **PLAIN})
    # Each worker keeps the checkpoint of its own shard.
    saved = tf.train.Checkpoint(handler=sharded).write(f"{path}/{index}")
    before = [table.numpy() for table in sharded.variables]
    for table in sharded.variables:
        table.assign(tf.zeros_like(table))
    tf.train.Checkpoint(handler=sharded).read(saved).assert_consumed()
    for table, old in zip(sharded.variables, before, strict=True):
        np.testing.assert_array_equal(table.numpy(), old)
    names = {name for name, _ in tf.train.list_variables(saved)}
    assert f"handler/tables/cache/age/{index}/.ATTRIBUTES/VARIABLE_VALUE" in names, names


def unlike_worker(index, rows, estimator):
    """Each worker traces its own program: that they differ is seen in the first step."""
    strategy, weights = cluster(), parameters()
    with strategy.scope():
        handler = handler_of(None, {"estimator": estimator}, 4, specs=PLAIN)
    step = tf.function(
        lambda given: strategy.run(step_of(handler, weights), args=(given,)), autograph=False
    )
    message = "unequal batches" if int(rows) > 1 else "set up differently"
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        step(batch(0, 1 + int(index) * (int(rows) - 1)))
    np.testing.assert_array_equal(local(strategy, handler.cache.age), negcache.EMPTY)


def test_two_workers_are_the_one_big_cache_and_are_told_of_unequal_batches(tmp_path):
    # An error of a step is the last case: it ends the workers' exchange.
    cases = (
        [("worker", index, tmp_path), ("unlike_worker", index, 2, "paper")] for index in range(2)
    )
    finish(*workers(*cases))


def test_workers_that_are_not_set_up_alike_are_told():
    names = enumerate(("paper", "shared"))
    finish(*workers(*([("unlike_worker", index, 1, name)] for index, name in names)), timeout=120)


if __name__ == "__main__":
    programs.main(globals(), sys.argv[1:])
