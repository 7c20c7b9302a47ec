"""Refresh and prefill: ages, stand-ins, poison, faults, and the paper's algorithm over a corpus."""

import jax
import negcache_jax
import negcache_tensorflow
import negcache_torch
import numpy as np
import pytest
import tensorflow as tf
import torch
from backends import BACKENDS
from handled import (
    HANDLED,
    assert_same_state,
    batch_of,
    double,
    failing,
    handler_of,
    multi_of,
    specs_of,
    state_of,
)

from negcache_core import (
    EMPTY,
    CapacityError,
    FieldSpec,
    KeysError,
    KindError,
    OptionError,
    ShapeError,
)

IDS = {
    "numpy": FieldSpec((), "int64"),
    "torch": FieldSpec((), torch.int64),
    "tensorflow": FieldSpec((), tf.int64),
}


def negate(features):
    return -features["x"]


def corpus_of(backend, rows, seed=0):
    x = np.random.default_rng(seed).uniform(1.0, 2.0, (rows, 2))
    return {"x": backend.to_native(x)}


def with_ages(backend, handler, ages):
    """Set the ages of a handler's cache, in place."""
    handler.backend.overwrite(handler.cache.age, backend.to_native(np.asarray(ages, np.int32)))


def recorded(network):
    """Return the network, and the list of what it saw."""
    seen = []

    def run(features):
        seen.append(np.asarray(features["x"]))
        return network(features)

    return run, seen


@HANDLED
@pytest.mark.parametrize("use_lru", [True, False])
def test_the_oldest_written_rows_are_embedded_anew_and_no_other_row_ages(backend, use_lru):
    handler = handler_of(backend, capacity=5)
    handler.cache_manager.use_lru = use_lru
    corpus = corpus_of(backend, 4)
    handler.prefill(double, corpus, 3)
    with_ages(backend, handler, [3, 7, 2, 3, EMPTY])
    x = np.asarray(corpus["x"])
    network, seen = recorded(negate)
    assert int(handler.refresh(network, 2)) == 0
    np.testing.assert_array_equal(seen, [x[[1, 0]]])  # the oldest, then the lower of two
    state = state_of(backend, handler)
    np.testing.assert_array_equal(state["age"], [0, 0, 2, 3, EMPTY])
    np.testing.assert_array_equal(state["embedding"][:4], [-x[0], -x[1], 2 * x[2], 2 * x[3]])
    np.testing.assert_array_equal(state["x"][:4], x)
    handler.refresh(network, 2)
    np.testing.assert_array_equal(seen[1], x[[3, 2]])


@HANDLED
def test_the_oldest_row_stands_in_where_fewer_are_written(backend):
    """A tower that embeds equal rows unlike: the slot gets the first, whatever the order."""
    handler = handler_of(backend, capacity=4)
    corpus = corpus_of(backend, 2)
    handler.prefill(double, corpus, 2)
    with_ages(backend, handler, [1, 4, EMPTY, EMPTY])
    x = np.asarray(corpus["x"])
    xp = handler.backend.xp

    def network(features):
        np.testing.assert_array_equal(np.asarray(features["x"]), x[[1, 0, 1, 1]])
        number = xp.astype(xp.arange(4, dtype=xp.int64), xp.float64)
        return features["x"] * 0.0 + number[:, None]

    assert int(handler.refresh(network, 4)) == 0
    state = state_of(backend, handler)
    np.testing.assert_array_equal(state["embedding"], [[1, 1], [0, 0], [0, 0], [0, 0]])
    np.testing.assert_array_equal(state["age"], [0, 0, EMPTY, EMPTY])
    np.testing.assert_array_equal(state["x"][2:], 0.0)


@HANDLED
def test_an_empty_cache_and_no_rows_are_left_alone(backend):
    handler = handler_of(backend)
    before = state_of(backend, handler)
    assert int(handler.refresh(failing, 3)) == 0
    assert_same_state(state_of(backend, handler), before)
    handler.prefill(double, corpus_of(backend, 2), 2)
    assert int(handler.refresh(failing, 0)) == 0
    assert int(handler.prefill(failing, corpus_of(backend, 0), 2)) == 0


@HANDLED
def test_a_refresh_that_is_not_finite_is_left_out_and_counted(backend):
    """70,000 is finite in float64 and infinite in the float16 of this cache."""
    handler = handler_of(backend, dtype="float16")
    handler.prefill(double, corpus_of(backend, 3), 3)
    with_ages(backend, handler, [5, 9, 7, EMPTY])
    before = state_of(backend, handler)
    for poison in (np.nan, 70_000.0):

        def network(features, poison=poison):
            first = np.zeros((4, 2))
            first[[0, 3]] = poison  # the oldest row, and a stand-in for it
            return negate(features) + backend.to_native(first)

        with_ages(backend, handler, [5, 9, 7, EMPTY])
        assert int(handler.refresh(network, 4)) == 1
        state = state_of(backend, handler)
        np.testing.assert_array_equal(state["age"], [0, 9, 0, EMPTY])
        np.testing.assert_array_equal(state["embedding"][1], before["embedding"][1])
        assert np.isfinite(state["embedding"]).all()
        np.testing.assert_array_equal(state["embedding"][0] < 0, [True, True])


@HANDLED
@pytest.mark.parametrize(
    ("network", "n", "error", "message"),
    [
        (double, 5, CapacityError, "n is 5, but the cache has 4 slots: expected at most that"),
        (double, -1, OptionError, "n is -1: expected at least 0"),
        (double, 2.0, KindError, "n is 2.0: expected a plain int"),
        (failing, 2, RuntimeError, "out of memory"),
        (lambda features: features["x"][:, :1], 2, ShapeError, "the item network's output has sh"),
        (lambda features: features["x"][:1], 2, ShapeError, "the item network's output has shape"),
    ],
)
def test_a_refresh_that_fails_leaves_the_cache_as_it_was(backend, network, n, error, message):
    handler = handler_of(backend)
    handler.prefill(double, corpus_of(backend, 3), 2)
    with_ages(backend, handler, [1, 2, 3, EMPTY])
    before = state_of(backend, handler)
    with pytest.raises(error, match=message):
        handler.refresh(network, n)
    assert_same_state(state_of(backend, handler), before)


@HANDLED
def test_prefill_embeds_in_batches_and_leaves_all_rows_equally_young(backend):
    handler, progressed = handler_of(backend, capacity=6), []
    corpus = corpus_of(backend, 5)
    network, seen = recorded(double)

    def progress(batches):
        progressed.append(len(batches))
        return batches

    assert int(handler.prefill(network, corpus, 2, progress=progress)) == 0
    assert [rows.shape[0] for rows in seen] == [2, 2, 1]
    assert progressed == [3]
    state, x = state_of(backend, handler), np.asarray(corpus["x"])
    np.testing.assert_array_equal(state["age"], [0] * 5 + [EMPTY])
    np.testing.assert_array_equal(state["x"][:5], x)
    np.testing.assert_array_equal(state["embedding"][:5], 2 * x)


@HANDLED
def test_no_batch_of_a_prefill_overwrites_another_in_a_cache_of_young_rows(backend):
    handler = handler_of(backend, capacity=4)
    handler.prefill(double, corpus_of(backend, 4, seed=1), 4)
    corpus = corpus_of(backend, 3, seed=2)
    handler.prefill(negate, corpus, 1)
    state = state_of(backend, handler)
    np.testing.assert_array_equal(state["x"][:3], np.asarray(corpus["x"]))
    np.testing.assert_array_equal(state["age"], 0)


@HANDLED
def test_prefill_leaves_out_what_is_not_finite_and_keeps_one_slot_for_an_item(backend):
    module = backend.module
    specs = {
        "id": module.FieldSpec((), "int64"),
        "x": module.FieldSpec((2,), "float64"),
        "embedding": module.FieldSpec((2,), "float64"),
    }
    handler = module.CacheLossHandler(
        module.CacheManager(specs, 6, unique_key="id"),
        module.CacheClassificationLoss("embedding", ("x",), generator=1),
        embedding_key="embedding",
        data_keys=("x",),
    )
    x = np.asarray([[1.0, 1], [np.nan, 2], [3, 3], [4, 4], [5, 5]])
    ids = np.asarray([7, 8, 9, 7, 9], np.int32)  # narrower than the field
    features = backend.native({"id": ids, "x": x, "unused": ids})
    assert int(handler.prefill(double, features, 2)) == 1
    state = state_of(backend, handler)
    np.testing.assert_array_equal(state["id"], [7, 9, 0, 0, 0, 0])
    np.testing.assert_array_equal(state["embedding"][:2], [[8, 8], [10, 10]])
    np.testing.assert_array_equal(state["age"], [0, 0, *[EMPTY] * 4])
    # A step gives the items of its batch their own slots, too.
    query, x = batch_of(backend, 0)
    features = {"x": x, "id": backend.to_native(np.asarray([9, 4]))}
    handler.update_cache_and_compute_loss(double, query, double(features), features)
    state = state_of(backend, handler)
    np.testing.assert_array_equal(state["id"], [7, 9, 4, 0, 0, 0])
    np.testing.assert_array_equal(state["embedding"][1:3], 2 * np.asarray(x))


@HANDLED
def test_a_prefill_that_fails_keeps_the_batches_before_it(backend):
    handler, calls = handler_of(backend), []

    def network(features):
        calls.append(1)
        return failing(features) if len(calls) == 2 else double(features)

    with pytest.raises(RuntimeError):
        handler.prefill(network, corpus_of(backend, 4), 2)
    np.testing.assert_array_equal(state_of(backend, handler)["age"], [0, 0, EMPTY, EMPTY])


@HANDLED
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"features": "many"}, CapacityError, "cannot prefill 5 rows into a cache of 4 slots"),
        ({"features": {}}, KeysError, r"features lack \['x'\]: the cache stores \['x'\]"),
        ({"features": 3}, KindError, "features is a int: expected a dict of field name"),
        ({"features": {"x": np.zeros((2, 3))}}, ShapeError, r"features\['x'\] has shape \(2, 3\)"),
        ({"batch_size": 0}, OptionError, "batch_size is 0: expected at least 1"),
        ({"batch_size": 2.5}, KindError, "batch_size is 2.5: expected a plain int"),
        ({"progress": "bar"}, KindError, "progress is 'bar': expected a function that wraps"),
    ],
)
def test_a_prefill_is_refused_before_the_network_runs(backend, change, error, message):
    handler = handler_of(backend)
    arguments = {"features": corpus_of(backend, 2), "batch_size": 2, **change}
    if change.get("features") == "many":
        arguments["features"] = corpus_of(backend, 5)
    with pytest.raises(error, match=message):
        handler.prefill(failing, **arguments)


@HANDLED
def test_a_reset_handler_has_the_cache_of_a_new_one_and_goes_on_with_its_draws(backend):
    handler, twin = (handler_of(backend, more={"id": IDS[backend.name]}) for _ in range(2))
    new = state_of(backend, handler)
    for each in (handler, twin):
        for seed in range(3):
            query, x = batch_of(backend, seed)
            ids = backend.to_native(np.asarray([seed, 9]))
            each.update_cache_and_compute_loss(double, query, double({"x": x}), {"x": x, "id": ids})
    handler.reset()
    assert_same_state(state_of(backend, handler), new)
    assert handler.metrics == {}
    noise = [
        backend.to_numpy(each.backend.uniform(each.cache_loss.generator, (3,), query))
        for each in (handler, twin)
    ]
    np.testing.assert_array_equal(*noise)


def test_a_reset_state_of_jax_is_a_new_one_but_for_its_key():
    handler = handler_of(
        BACKENDS["jax"], loss=BACKENDS["jax"].module.CacheClassificationLoss("embedding", ("x",))
    )
    new = handler.init(jax.random.key(0))
    filled = handler.prefill(new, double, corpus_of(BACKENDS["jax"], 3), 2)
    assert int((filled.caches["cache"].age < EMPTY).sum()) == 3
    again = jax.jit(handler.reset, donate_argnums=0)(filled)
    jax.tree.map(
        np.testing.assert_array_equal, again.caches, handler.init(jax.random.key(0)).caches
    )


@HANDLED
def test_a_handler_takes_the_names_of_fields_from_its_loss(backend):
    module = backend.module
    manager = module.CacheManager(specs_of(module), 4)
    loss = module.CacheClassificationLoss("embedding", ("x",), generator=1)
    handler = module.CacheLossHandler(manager, loss)
    assert (handler.embedding_key, handler.data_keys) == ("embedding", ("x",))
    with pytest.raises(KeysError, match="embedding_key is missing: the loss does not name it"):
        module.CacheLossHandler(manager, lambda **arguments: None, data_keys=("x",))


@HANDLED
def test_several_caches_are_kept_up_by_name_or_together(backend):
    multi = multi_of(backend)  # "b" of 2 slots, "a" of 3
    a, b = corpus_of(backend, 3, seed=1), corpus_of(backend, 2, seed=2)
    multi.prefill(double, {"a": a}, 2)
    assert (np.asarray(multi.cache["b"].age) == EMPTY).all()
    multi.prefill(double, {"b": b}, 2)
    multi.refresh(negate, 1, cache_name="b")
    embeddings = backend.numpy({name: cache.data for name, cache in multi.cache.items()})
    np.testing.assert_array_equal(embeddings["a"]["embedding"], 2 * np.asarray(a["x"]))
    assert (embeddings["b"]["embedding"][0] < 0).all()
    assert (embeddings["b"]["embedding"][1] > 0).all()
    assert int(multi.refresh(lambda features: features["x"] * np.nan, 2)) == 4
    before = backend.numpy(dict(multi.cache))
    calls = []

    def network(features):
        calls.append(1)
        return failing(features) if len(calls) == 2 else negate(features)

    with pytest.raises(RuntimeError):
        multi.refresh(network, 2)
    for name, cache in backend.numpy(dict(multi.cache)).items():
        np.testing.assert_array_equal(cache.data["embedding"], before[name].data["embedding"])
    with pytest.raises(CapacityError, match="n is 3, but the cache has 2 slots"):
        multi.refresh(negate, 3)
    with pytest.raises(KeysError, match=r"unknown: \['c'\]"):
        multi.refresh(negate, 1, cache_name="c")
    with pytest.raises(KeysError, match=r"unknown: \['c'\]"):
        multi.prefill(negate, {"c": a}, 1)


def exact_loss(query, positive, corpus):
    """Return the mean cross-entropy over the positive and the corpus, worked out naively."""
    scores = np.concatenate([np.sum(query * positive, axis=1)[:, None], query @ corpus.T], axis=1)
    return np.mean(np.log(np.sum(np.exp(scores), axis=1)) - scores[:, 0])


@HANDLED
def test_a_cache_of_the_corpus_refreshed_whole_gives_the_exact_cross_entropy(backend):
    """The paper's algorithm that is not streaming: the cache is all items, at one age."""
    handler = handler_of(backend, capacity=9)
    corpus = corpus_of(backend, 9)
    handler.prefill(double, corpus, 4)
    query, x = batch_of(backend, 5, rows=3)
    weight = backend.to_native(np.asarray([[0.3, -1.2], [0.8, 0.5]]))
    xp = handler.backend.xp

    def tower(features):
        return xp.matmul(features["x"], weight)

    for network in (double, tower):
        if network is tower:
            handler.refresh(tower, 9)
        everything = np.asarray(network(corpus))
        np.testing.assert_array_equal(state_of(backend, handler)["embedding"], everything)
        retrieval = handler.retrieve(query, {"x": x})
        negatives = network(retrieval.features)
        result = handler.compute_loss(query, network({"x": x}), negatives, retrieval)
        expected = exact_loss(np.asarray(query), np.asarray(network({"x": x})), everything)
        np.testing.assert_allclose(float(result.interpretable_loss), expected, rtol=1e-12)


def jax_state(capacity=5):
    handler = handler_of(BACKENDS["jax"], capacity=capacity, loss=jax_loss())
    return handler, handler.init(jax.random.key(0))


def jax_loss():
    return negcache_jax.CacheClassificationLoss("embedding", ("x",))


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_jax_keeps_its_state_explicit(jit):
    handler, empty = jax_state()
    corpus = corpus_of(BACKENDS["jax"], 4)
    state = handler.prefill(empty, double, corpus, 3)
    cache, x = state.caches["cache"], np.asarray(corpus["x"])
    np.testing.assert_array_equal(cache.data["embedding"][:4], 2 * x)
    np.testing.assert_array_equal(cache.age, [0, 0, 0, 0, EMPTY])
    aged = cache._replace(age=np.asarray([3, 7, 2, 3, EMPTY], np.int32))
    state = state._replace(caches={"cache": jax.tree.map(jax.numpy.asarray, aged)})

    def refresh(state, factor):
        return handler.refresh(state, lambda features: features["x"] * factor, 2)

    run = jax.jit(refresh) if jit else refresh
    after = run(state, -1.0).caches["cache"]
    np.testing.assert_array_equal(after.age, [0, 0, 2, 3, EMPTY])
    np.testing.assert_array_equal(after.data["embedding"][:4], np.concatenate([-x[:2], 2 * x[2:]]))
    np.testing.assert_array_equal(state.caches["cache"].data["embedding"][:4], 2 * x)
    np.testing.assert_array_equal(run(empty, np.nan).caches["cache"].age, EMPTY)
    gradient = jax.grad(lambda factor: run(state, factor).caches["cache"].data["embedding"].sum())(
        3.0
    )
    assert float(gradient) == 0.0
    # The corpus whole: as if embedded afresh.
    assert np.array_equal(
        handler.refresh(state, negate, 5).caches["cache"].data["embedding"][:4], -x
    )


@pytest.mark.parametrize("jit_compile", [None, False, True], ids=["eager", "graph", "xla"])
def test_tensorflow_refreshes_in_traced_functions_and_on_no_tape(jit_compile):
    backend = BACKENDS["tensorflow"]
    handler = handler_of(backend, capacity=5)
    corpus = corpus_of(backend, 4)
    factor = tf.Variable(-1.0, dtype=tf.float64)

    def refresh():
        with tf.GradientTape() as tape:
            left_out = handler.refresh(lambda features: features["x"] * factor, 2)
            total = tf.reduce_sum(handler.cache.data["embedding"])
        return left_out, tape.gradient(total, factor)

    run = refresh if jit_compile is None else tf.function(refresh, jit_compile=jit_compile)
    assert int(run()[0]) == 0
    np.testing.assert_array_equal(state_of(backend, handler)["age"], EMPTY)
    np.testing.assert_array_equal(state_of(backend, handler)["embedding"], 0.0)
    handler.prefill(double, corpus, 3)
    with_ages(backend, handler, [3, 7, 2, 3, EMPTY])
    left_out, gradient = run()
    state, x = state_of(backend, handler), np.asarray(corpus["x"])
    assert int(left_out) == 0
    assert gradient is None
    np.testing.assert_array_equal(state["age"], [0, 0, 2, 3, EMPTY])
    np.testing.assert_array_equal(state["embedding"][:4], np.concatenate([-x[:2], 2 * x[2:]]))
    factor.assign(np.nan)
    assert int(run()[0]) == 2


def test_tensorflow_prefills_eagerly_only():
    handler = handler_of(BACKENDS["tensorflow"])

    @tf.function(input_signature=[tf.TensorSpec([None, 2], tf.float64)])
    def prefill(x):
        return handler.prefill(double, {"x": x}, 2)

    with pytest.raises(negcache_tensorflow.OptionError, match="unknown number of rows"):
        prefill(tf.ones((3, 2), tf.float64))


def test_torch_records_nothing_and_leaves_the_towers_mode():
    handler = handler_of(BACKENDS["torch"])
    tower = torch.nn.Linear(2, 2, dtype=torch.float64).train()

    def network(features):
        assert not torch.is_grad_enabled()
        return tower(features["x"])

    corpus = corpus_of(BACKENDS["torch"], 3)
    handler.prefill(network, corpus, 2)
    with torch.no_grad():
        tower.weight += 1.0
    handler.refresh(network, 4)
    assert tower.training
    assert not any(each.requires_grad for each in handler.state_dict(keep_vars=True).values())
    with torch.no_grad():
        expected = tower(corpus["x"])
    torch.testing.assert_close(handler.cache.data["embedding"][:3], expected)
    torch.testing.assert_close(
        handler.state_dict()["tables.cache_cache.age"][:3], torch.zeros(3, dtype=torch.int32)
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torch_compiles_refresh_and_unique_items_to_one_graph():
    torch._dynamo.reset()
    specs = {
        "id": negcache_torch.FieldSpec((), torch.int64),
        "embedding": negcache_torch.FieldSpec((3,), torch.float32),
    }
    tower, caches = torch.nn.Embedding(50, 3), []

    def network(features):
        return tower(features["id"])

    for compiled in (False, True):
        handler = negcache_torch.CacheLossHandler(
            negcache_torch.CacheManager(specs, 300, unique_key="id"),
            negcache_torch.CacheClassificationLoss("embedding", ("id",), generator=0),
            embedding_key="embedding",
            data_keys=("id",),
        )

        def step(queries, ids, handler=handler):
            loss = handler(network, queries, network({"id": ids}), {"id": ids})
            return loss, handler.refresh(network, 7)

        if compiled:
            step = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
        generator = torch.Generator().manual_seed(1)
        for rows in (5, 9, 20, 9):
            queries = torch.randn(rows, 3, generator=generator)
            step(queries, torch.randint(50, (rows,), generator=generator))
        caches.append(handler.cache)
    torch.testing.assert_close(caches[0].data, caches[1].data)
    torch.testing.assert_close(caches[0].age, caches[1].age)
    held = caches[0].data["id"][caches[0].age != EMPTY].tolist()
    assert len(held) == len(set(held)) > 20


def test_prefill_lets_in_what_the_filter_lets_in():
    backend = BACKENDS["numpy"]
    handler = handler_of(
        backend,
        capacity=6,
        more={"id": backend.module.FieldSpec((), "int64")},
        new_items_filter=backend.module.IsInCacheFilterFn(("id",)),
    )
    features = {**corpus_of(backend, 3), "id": np.asarray([4, 5, 6])}
    for _ in range(2):
        assert int(handler.prefill(double, features, 2)) == 0
        np.testing.assert_array_equal(handler.cache.data["id"], [4, 5, 6, 0, 0, 0])


def test_jax_keeps_up_several_caches():
    backend = BACKENDS["jax"]
    handler = negcache_jax.MultiCacheLossHandler(
        {
            name: negcache_jax.CacheManager(
                specs_of(negcache_jax),
                2,
            )
            for name in "ab"
        },
        jax_loss(),
        embedding_key="embedding",
        data_keys=("x",),
    )
    corpora = {name: corpus_of(backend, 2, seed) for seed, name in enumerate("ab")}
    state = handler.prefill(handler.init(jax.random.key(0)), double, corpora, 2)
    state = handler.refresh(state, negate, 2, cache_name="b")
    for name, factor in (("a", 2), ("b", -1)):
        x = np.asarray(corpora[name]["x"])
        np.testing.assert_array_equal(state.caches[name].data["embedding"], factor * x)
