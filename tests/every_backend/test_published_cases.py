"""The published test cases: their inputs and their figures, on three backends.

Three inputs are mended: ages get one entry per row (the published code never looked at them), fresh
caches are EMPTY instead of age 0, and a retrieval function is passed in instead of patched in.
"""

import negcache_tensorflow
import negcache_torch
import numpy as np
import pytest
import tensorflow as tf
import torch
from backends import BACKENDS

from negcache_core import EMPTY

PUBLISHED = pytest.mark.parametrize(
    "backend", [BACKENDS[name] for name in ("numpy", "torch", "tensorflow")], ids=lambda b: b.name
)


def floats(backend, *rows):
    return backend.to_native(np.asarray(rows, np.float32))


def ints(backend, rows, dtype=np.int32):
    return backend.to_native(np.asarray(rows, dtype))


def cache_of(backend, embeddings, data=None):
    data = embeddings if data is None else data
    return backend.module.NegativeCache(
        data={"embeddings": floats(backend, *embeddings), "data": floats(backend, *data)},
        age=ints(backend, [0] * len(embeddings)),
    )


def network(features):
    return features["data"]


def always(backend, slots):
    return lambda _scores: ints(backend, slots, np.int64)


def both_reductions(backend, call, expected):
    """Check a loss per query, and its mean."""
    close(backend, call(reducer=None), expected)
    close(backend, call(), np.mean(expected))


def close(backend, given, expected):
    np.testing.assert_allclose(backend.to_numpy(given), expected, rtol=2e-6, atol=1e-6)


def equal(backend, given, expected):
    np.testing.assert_array_equal(backend.to_numpy(given), expected)


def run(backend, query, positive, cache, **options):
    loss = backend.module.CacheClassificationLoss("embeddings", ["data"], **options)
    return loss(network, floats(backend, *query), floats(backend, *positive), cache)


QUERY, POSITIVE, ROWS = ([-1.0], [1.0], [3.0]), ([2.0], [2.0], [1.0]), ([1.0], [-1.0])
PROB_POS = np.asarray([0.0420101, 0.705385, 0.499381])
DIFFERENCES = np.asarray([1.0, -3.0, 0.0])
TOP_K_ROWS = ([1.0], [-1.0], [3.0], [2.0])
TOP_K_QUERY, TOP_K_POSITIVE = ([-1.0], [1.0]), ([2.0], [2.0])


@PUBLISHED
def test_interpretable_loss(backend):
    both_reductions(
        backend,
        lambda **o: (
            run(
                backend, QUERY, POSITIVE, {"cache": cache_of(backend, ROWS)}, **o
            ).interpretable_loss
        ),
        [3.169846, 0.349012, 0.694385],
    )


@PUBLISHED
def test_training_loss(backend):
    both_reductions(
        backend,
        lambda **o: (
            run(
                backend,
                QUERY,
                POSITIVE,
                {"cache": cache_of(backend, ROWS)},
                retrieval_fn=always(backend, [[0], [1], [0]]),
                **o,
            ).training_loss
        ),
        (1 - PROB_POS) * DIFFERENCES,
    )


@PUBLISHED
def test_training_loss_with_score_transform(backend):
    def double(rows):
        return tuple([2.0 * row[0]] for row in rows)

    both_reductions(
        backend,
        lambda **o: (
            run(
                backend,
                double(QUERY),
                double(POSITIVE),
                {"cache": cache_of(backend, double(ROWS))},
                score_transform=lambda scores: 0.25 * scores,
                retrieval_fn=always(backend, [[0], [1], [0]]),
                **o,
            ).training_loss
        ),
        (1 - PROB_POS) * DIFFERENCES,
    )


@PUBLISHED
def test_training_loss_with_multi_cache(backend):
    caches = {"cache1": cache_of(backend, ROWS[:1]), "cache2": cache_of(backend, ROWS[1:])}
    both_reductions(
        backend,
        lambda **o: (
            run(
                backend,
                QUERY,
                POSITIVE,
                caches,
                retrieval_fn=always(backend, [[0], [1], [0]]),
                **o,
            ).training_loss
        ),
        (1 - PROB_POS) * DIFFERENCES,
    )


@pytest.mark.parametrize(
    "backend", [BACKENDS["torch"], BACKENDS["tensorflow"]], ids=lambda b: b.name
)
def test_training_loss_gradient(backend):
    cache = {"cache": cache_of(backend, ROWS)}
    loss = backend.module.CacheClassificationLoss(
        "embeddings", ["data"], retrieval_fn=always(backend, [[0], [1], [0]])
    )

    def value(query_model, doc_model):
        return loss(
            lambda data: data["data"] * doc_model,
            query_model * floats(backend, *QUERY),
            doc_model * floats(backend, *POSITIVE),
            cache,
        ).training_loss

    ones = [backend.to_native(np.float32(1.0)) for _ in range(2)]
    np.testing.assert_allclose(backend.gradients(value, ones), [0.024715006] * 2, atol=1e-6)


@PUBLISHED
def test_refreshed_embeddings(backend):
    caches = {
        "cache1": cache_of(backend, ([1.0], [2.0], [3.0]), ([10.0], [20.0], [30.0])),
        "cache2": cache_of(backend, ([-1.0], [-2.0]), ([-10.0], [-20.0])),
    }
    out = run(
        backend, ([0.0],) * 3, POSITIVE, caches, retrieval_fn=always(backend, [[0], [1], [3]])
    )
    equal(backend, out.updated_item_mask["cache1"], [True, True, False])
    equal(backend, out.updated_item_mask["cache2"], [False, False, True])
    equal(backend, out.updated_item_data["cache1"]["embeddings"][0:2], [[10.0], [20.0]])
    equal(backend, out.updated_item_data["cache2"]["embeddings"][2], [-10.0])
    equal(backend, out.updated_item_indices["cache1"][0:2], [0, 1])
    equal(backend, out.updated_item_indices["cache2"][2], 0)


@PUBLISHED
def test_staleness(backend):
    cache = {"cache": cache_of(backend, ROWS, ([2.0], [-3.0]))}
    fixed = always(backend, [[0], [1], [0]])
    both_reductions(
        backend,
        lambda **o: (
            run(backend, ([0.0],) * 3, ([0.0],) * 3, cache, retrieval_fn=fixed, **o).staleness
        ),
        [1 / 4, 4 / 9, 1 / 4],
    )
    close(backend, 0.31481481481 * floats(backend, 1.0), np.mean([1 / 4, 4 / 9, 1 / 4]))


@PUBLISHED
def test_top_k(backend):
    cache = {"cache": cache_of(backend, TOP_K_ROWS)}
    out = run(backend, TOP_K_QUERY, TOP_K_POSITIVE, cache, reducer=None, top_k=2)
    close(backend, out.interpretable_loss, [3.0949229, 1.407605964])
    first = always(backend, [[0], [0]])
    out = run(
        backend, TOP_K_QUERY, TOP_K_POSITIVE, cache, reducer=None, top_k=2, retrieval_fn=first
    )
    prob_pos = np.asarray([0.045278503, 0.2447284712])
    close(backend, out.training_loss, (1 - prob_pos) * [3.0, -1.0])
    close(backend, out.updated_item_data["cache"]["embeddings"], [[-1.0], [1.0]])
    equal(backend, out.updated_item_indices["cache"], [1, 0])
    equal(backend, out.updated_item_mask["cache"], [True, True])


@PUBLISHED
def test_approximate_top_k_with_indices(backend):
    scores = floats(backend, [1.0, 2.0, 3.0, 4.0], [2.0, 1.0, 3.0, 4.0], [4.0, 1.0, 3.0, 2.0])
    best, columns = backend.module.approximate_top_k_with_indices(scores, k=2)
    close(backend, best, [[2.0, 4.0], [2.0, 4.0], [4.0, 3.0]])
    equal(backend, columns, [[1, 3], [0, 3], [0, 2]])


@PUBLISHED
def test_retrieval_fns(backend):
    scores = floats(backend, [1.0, 2.0, 0.0], [-1.0, 0.0, 3.0], [4.0, -1.0, -1.0])
    equal(backend, backend.module.MaxScoreRetrievalFn()(scores), [[1], [2], [0]])
    scores = floats(backend, [1.0, 0.0, 0.0], [100.0, 0.0, 0.0], [0.0, 0.0, -1.0])
    noise = floats(backend, [0.0, 0.1, -0.1], [1.0, -2.0, 3.3], [0.1, -0.1, 2.0])
    gumbel = backend.module.GumbelMaxRetrievalFn()
    equal(backend, gumbel(scores, noise), [[0], [0], [2]])
    assert tuple(gumbel(scores).shape) == (3, 1)
    warm = backend.module.GumbelMaxRetrievalFn(inv_temp=0.5)
    equal(backend, warm(floats(backend, [1.0, 0.0, 0.0]), floats(backend, [0.0, 0.9, 0.0])), [[1]])


@PUBLISHED
@pytest.mark.parametrize(
    ("keys", "expected"),
    [(("1", "2"), [False, True, False, True, True]), (("1",), [False, False, False, True, True])],
)
def test_is_in_cache_filter(backend, keys, expected):
    data = {
        "1": ints(backend, [[0, 0], [1, 1], [2, 2], [3, 3], [20, 20], [30, 30], [40, 40]]),
        "2": ints(backend, [[4, 4], [5, 5], [6, 6], [7, 7], [50, 50], [60, 60], [70, 70]]),
    }
    new_items = {
        "1": ints(backend, [[0, 0], [1, 1], [3, 3], [8, 8], [9, 9]]),
        "2": ints(backend, [[4, 4], [7, 7], [7, 7], [10, 10], [11, 11]]),
    }
    cache = backend.module.NegativeCache(data, ints(backend, [0] * 7))
    equal(backend, backend.module.IsInCacheFilterFn(keys=keys)(cache, new_items), expected)


def manager_of(backend, shapes, cache_size, **options):
    dtypes = {"1": "int32", "2": "float32" if shapes.get("2") == (3,) else "int32"}
    specs = {key: backend.module.FieldSpec(shape, dtypes[key]) for key, shape in shapes.items()}
    return backend.module.CacheManager(specs, cache_size=cache_size, **options)


def filled(backend, value, rows=2):
    return {
        "1": ints(backend, [[value] * 2] * rows),
        "2": floats(backend, *[[float(value)] * 3] * rows),
    }


@PUBLISHED
def test_init_cache(backend):
    specs = {"1": ((2,), "int32"), "2": ((3,), "float32"), "3": ((3, 2), "float32")}
    specs = {key: backend.module.FieldSpec(*spec) for key, spec in specs.items()}
    cache = backend.module.CacheManager(specs=specs, cache_size=6).init_cache()
    assert set(cache.data) == {"1", "2", "3"}
    for key, shape in (("1", (6, 2)), ("2", (6, 3)), ("3", (6, 3, 2))):
        equal(backend, cache.data[key], np.zeros(shape))
    equal(backend, cache.age, [EMPTY] * 6)


@PUBLISHED
@pytest.mark.parametrize(
    ("size", "rows", "ages"),
    [
        (4, [[1, 1, 0, 0], [1, 1, 2, 2], [3, 3, 2, 2]], [0, 0, EMPTY, EMPTY]),
        (3, [[1, 1, 0], [2, 1, 2]], [0, 0, EMPTY]),
    ],
)
def test_update_cache_in_turn(backend, size, rows, ages):
    manager = manager_of(backend, {"1": (2,), "2": (3,)}, size)
    cache = manager.init_cache()
    for value, expected in enumerate(rows, start=1):
        cache = manager.update_cache(cache, new_items=filled(backend, value))
        equal(backend, cache.data["1"], [[row] * 2 for row in expected])
        equal(backend, cache.data["2"], [[row] * 3 for row in expected])
        if value == 1:
            equal(backend, cache.age, ages)
        if value == 2 and size == 3:
            equal(backend, cache.age, [0, 1, 0])


@PUBLISHED
def test_update_existing_items(backend):
    manager = manager_of(backend, {"1": (2,), "2": (3,)}, 4)
    slots = ints(backend, [1, 3])
    for fields in (("1", "2"), ("1",)):
        data = {key: filled(backend, 1)[key] for key in fields}
        cache = manager.update_cache(
            manager.init_cache(), updated_item_data=data, updated_item_indices=slots
        )
        equal(backend, cache.data["1"], [[0, 0], [1, 1], [0, 0], [1, 1]])
        second = [0.0, 1.0, 0.0, 1.0] if "2" in fields else [0.0] * 4
        equal(backend, cache.data["2"], [[value] * 3 for value in second])
        equal(backend, cache.age, [EMPTY, 0, EMPTY, 0])


@PUBLISHED
def test_new_and_existing_items_together(backend):
    manager = manager_of(backend, {"1": (1,), "2": (1,)}, 2)
    cache = backend.module.NegativeCache(
        data={"1": ints(backend, [[0], [0], [3]]), "2": ints(backend, [[1], [2], [4]])},
        age=ints(backend, [2, 1, 0]),
    )
    cache = manager.update_cache(
        cache,
        new_items={"1": ints(backend, [[11]]), "2": ints(backend, [[12]])},
        updated_item_data={"1": ints(backend, [[10]])},
        updated_item_indices=ints(backend, [0]),
    )
    equal(backend, cache.data["1"], [[10], [11], [3]])
    equal(backend, cache.data["2"], [[1], [12], [4]])
    equal(backend, cache.age, [0, 0, 1])


@PUBLISHED
@pytest.mark.parametrize("slots", [[1, 3], [0, 3]])
def test_masked_update(backend, slots):
    manager = manager_of(backend, {"1": (2,), "2": (3,)}, 4)
    cache = manager.update_cache(
        manager.init_cache(),
        updated_item_data={
            "1": ints(backend, [[1, 1], [2, 2]]),
            "2": floats(backend, [3.0] * 3, [4.0] * 3),
        },
        updated_item_indices=ints(backend, slots),
        updated_item_mask=backend.to_native(np.asarray([True, False])),
    )
    written = [int(slot == slots[0]) for slot in range(4)]
    equal(backend, cache.data["1"], [[value] * 2 for value in written])
    equal(backend, cache.data["2"], [[3.0 * value] * 3 for value in written])
    equal(backend, cache.age, [0 if value else EMPTY for value in written])


@PUBLISHED
def test_all_masked_update_and_fifo(backend):
    rows = ints(backend, [[5, 5], [10, 10], [15, 15], [20, 20]])
    update = {
        "updated_item_indices": ints(backend, [1, 3]),
        "updated_item_data": {"1": ints(backend, [[1, 1], [2, 2]])},
    }
    cache = backend.module.NegativeCache({"1": rows}, ints(backend, [2, 2, 2, 2]))
    masked = manager_of(backend, {"1": (2,)}, 4).update_cache(
        cache, updated_item_mask=backend.to_native(np.asarray([False, False])), **update
    )
    equal(backend, masked.data["1"], backend.to_numpy(rows))
    equal(backend, masked.age, [3, 3, 3, 3])
    cache = backend.module.NegativeCache({"1": rows}, ints(backend, [1, 0, 1, 1]))
    fifo = manager_of(backend, {"1": (2,)}, 4, use_lru=False).update_cache(cache, **update)
    equal(backend, fifo.data["1"], [[5, 5], [1, 1], [15, 15], [2, 2]])
    equal(backend, fifo.age, [2, 1, 2, 2])


@PUBLISHED
def test_new_items_with_mask(backend):
    cache = backend.module.NegativeCache(
        {"1": ints(backend, [[1, 1], [2, 2], [3, 3], [4, 4]])}, ints(backend, [0, 2, 1, 3])
    )
    cache = manager_of(backend, {"1": (2,)}, 4).update_cache(
        cache,
        new_items={"1": ints(backend, [[5, 5], [6, 6], [7, 7]])},
        new_items_mask=backend.to_native(np.asarray([True, False, True])),
    )
    equal(backend, cache.data["1"], [[1, 1], [7, 7], [3, 3], [5, 5]])


@PUBLISHED
def test_wrong_keys_and_sizes_are_value_errors(backend):
    manager = manager_of(backend, {"1": (2,), "2": (3,)}, 4)
    cache = manager.init_cache()
    good = filled(backend, 1)
    for new_items in (
        {"1": good["1"]},
        {**good, "3": good["1"]},
        {**good, "2": good["2"][:1]},
    ):
        with pytest.raises(ValueError, match="new_items"):
            manager.update_cache(cache, new_items=new_items)
    with pytest.raises(ValueError, match="updated_item_data"):
        manager.update_cache(
            cache,
            updated_item_data={"3": good["1"]},
            updated_item_indices=ints(backend, [0, 1]),
        )


@PUBLISHED
def test_handler_with_a_loss_of_ones_own(backend):
    """The published stub: any callable that returns a CacheLossReturn will do."""
    module = backend.module

    def stub(doc_network, query_embeddings, pos_doc_embeddings, cache):
        assert doc_network is None
        assert query_embeddings is None
        assert set(cache) == {"cache"}
        return module.CacheLossReturn(
            training_loss=0.0,
            interpretable_loss=0.0,
            updated_item_data={"cache": {"embedding": floats(backend, [1.0] * 3)}},
            updated_item_indices={"cache": ints(backend, [0])},
            updated_item_mask={"cache": backend.to_native(np.asarray([True]))},
            staleness=0.0,
        )

    specs = {
        "data": module.FieldSpec((2,), "int32"),
        "embedding": module.FieldSpec((3,), "float32"),
    }
    handler = module.CacheLossHandler(
        module.CacheManager(specs, cache_size=4),
        stub,
        embedding_key="embedding",
        data_keys=("data",),
    )
    equal(backend, handler.cache.data["data"], np.zeros((4, 2)))
    equal(backend, handler.cache.data["embedding"], np.zeros((4, 3)))
    loss = handler.update_cache_and_compute_loss(
        item_network=None,
        query_embeddings=None,
        pos_item_embeddings=floats(backend, [2.0] * 3),
        features={"data": ints(backend, [[2, 2]])},
    )
    assert loss == 0.0
    equal(backend, handler.cache.data["data"], [[0, 0], [2, 2], [0, 0], [0, 0]])
    equal(backend, handler.cache.data["embedding"], [[1.0] * 3, [2.0] * 3, [0.0] * 3, [0.0] * 3])
    equal(backend, handler.cache.age, [0, 0, EMPTY, EMPTY])


@pytest.mark.parametrize("framework", ["tensorflow", "torch"])
def test_published_readme_usage_runs_with_the_import_line_changed(framework):
    package = {"tensorflow": negcache_tensorflow, "torch": negcache_torch}[framework]
    handlers, losses, negative_cache = package.handlers, package.losses, package.negative_cache
    if framework == "tensorflow":

        def spec(size, dtype):
            return tf.io.FixedLenFeature([size], getattr(tf, dtype))

        random, gather, mean = tf.random.uniform, tf.gather, tf.reduce_mean
        random_ids = lambda: tf.random.uniform((3, 2), 0, 9, tf.int32)  # noqa: E731
    else:

        def spec(size, dtype):
            return package.FieldSpec([size], getattr(torch, dtype))

        random, gather, mean = torch.rand, lambda table, ids: table[ids], torch.mean
        random_ids = lambda: torch.randint(0, 9, (3, 2), dtype=torch.int32)  # noqa: E731
    table = random((9, 4))

    data_keys = ("document_feature_1", "document_feature_2")
    embedding_key = "embedding"
    specs = {
        "document_feature_1": spec(2, "int32"),
        "document_feature_2": spec(2, "int32"),
        "embedding": spec(4, "float32"),
    }
    cache_manager = negative_cache.CacheManager(specs, cache_size=131072)
    cache_loss = losses.CacheClassificationLoss(
        embedding_key=embedding_key,
        data_keys=data_keys,
        score_transform=lambda score: 20.0 * score,
        top_k=64,
    )
    handler = handlers.CacheLossHandler(
        cache_manager, cache_loss, embedding_key=embedding_key, data_keys=data_keys
    )

    def document_network(data):
        return mean(gather(table, data["document_feature_1"]), 1) + mean(
            gather(table, data["document_feature_2"]), 1
        )

    for step in range(2):
        document_data = {key: random_ids() for key in data_keys}
        query_embeddings = random((3, 4))
        document_embeddings = document_network(document_data)
        loss = handler.update_cache_and_compute_loss(
            document_network, query_embeddings, document_embeddings, document_data
        )
        assert np.isfinite(float(loss))
        assert (float(loss) > 0) == (step > 0)  # the first step meets an empty cache
        written = np.asarray(handler.cache.age) != EMPTY
        assert written.sum() == 3 * (step + 1)
