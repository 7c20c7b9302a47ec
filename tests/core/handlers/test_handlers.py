"""Handlers on three backends: phases, filters, empty caches, poison, and faults."""

import numpy as np
import pytest
from backends import BACKENDS
from handled import (
    HANDLED,
    assert_same_state,
    batch_of,
    double,
    failing,
    handler_of,
    multi_of,
    state_of,
)

from negcache_core import EMPTY, CapacityError, NegcacheError, OptionError, ShapeError


@HANDLED
def test_one_call_is_the_three_phases(backend):
    whole, phased = handler_of(backend), handler_of(backend)
    for seed in range(5):
        query, x = batch_of(backend, seed)
        loss = whole.update_cache_and_compute_loss(double, query, double({"x": x}), {"x": x})
        retrieval = phased.retrieve(query, {"x": x})
        # One encoder call for positives and negatives together.
        xp = backend.module.CacheManager.backend.xp
        both = double({"x": xp.concat([x, retrieval.features["x"]])})
        result = phased.compute_loss(query, both[:2], both[2:], retrieval)
        phased.commit(result, both[:2], {"x": x})
        np.testing.assert_array_equal(backend.to_numpy(loss), backend.to_numpy(result.loss))
        np.testing.assert_array_equal(
            backend.to_numpy(result.loss), backend.to_numpy(result.interpretable_loss)
        )
        assert_same_state(state_of(backend, phased), state_of(backend, whole))


@HANDLED
def test_an_encoder_never_sees_zeros_and_an_empty_cache_weighs_nothing(backend):
    handler, seen = handler_of(backend), []

    def network(features):
        seen.append(np.array(backend.to_numpy(features["x"])))
        return double(features)

    for seed in range(4):
        query, x = batch_of(backend, seed)
        loss = handler.update_cache_and_compute_loss(network, query, double({"x": x}), {"x": x})
        if seed == 0:
            assert float(loss) == 0.0
            np.testing.assert_array_equal(seen[0], backend.to_numpy(x))  # its own positives
            assert float(backend.to_numpy(handler.metrics["masked_count"])) == 2.0
    assert all((rows != 0).all() for rows in seen)


@pytest.mark.parametrize(
    "backend", [BACKENDS["torch"], BACKENDS["tensorflow"]], ids=lambda b: b.name
)
def test_an_empty_cache_gives_no_gradient(backend):
    handler = handler_of(backend)
    query, x = batch_of(backend, 0)

    def value(query, positive, weight):
        retrieval = handler.retrieve(query, {"x": x})
        return handler.compute_loss(
            query, positive, retrieval.features["x"] * weight, retrieval
        ).loss

    arrays = [query, x, backend.to_native(np.asarray(3.0))]
    for gradient in backend.gradients(value, arrays):
        np.testing.assert_array_equal(gradient, 0.0)


@HANDLED
@pytest.mark.parametrize("chosen", [[[3], [3]], [[-1], [99]], [[0], [99]]])
def test_slots_that_a_retrieval_fn_must_not_choose_count_for_nothing(backend, chosen):
    """Empty slots and slots out of range: weight 0, the positive's features, no refresh."""
    module = backend.module
    loss = module.CacheClassificationLoss(
        "embedding",
        ("x",),
        reducer=None,
        retrieval_fn=lambda scores: backend.to_native(np.asarray(chosen)),
    )
    handler = handler_of(backend, loss=loss)
    query, x = batch_of(backend, 0)
    handler.commit(_first_result(backend, handler, query, x), double({"x": x}), {"x": x})
    retrieval = handler.retrieve(query, {"x": x})
    usable = np.asarray([[slot in (0, 1)] for [slot] in chosen])
    np.testing.assert_array_equal(backend.to_numpy(retrieval.drawn), usable)
    features = np.asarray(backend.to_numpy(retrieval.features["x"]))
    np.testing.assert_array_equal(features[~usable[:, 0]], np.asarray(x)[~usable[:, 0]])
    result = handler.compute_loss(query, double({"x": x}), double(retrieval.features), retrieval)
    np.testing.assert_array_equal(backend.to_numpy(result.updated_item_mask["cache"]), usable[:, 0])
    training = np.asarray(backend.to_numpy(result.training_loss))
    np.testing.assert_array_equal(training[~usable[:, 0]], 0.0)


def _first_result(backend, handler, query, x):
    retrieval = handler.retrieve(query, {"x": x})
    return handler.compute_loss(query, double({"x": x}), double(retrieval.features), retrieval)


@HANDLED
def test_filter_keeps_one_slot_for_an_item(backend):
    module = backend.module
    handler = handler_of(
        backend,
        more={"id": module.FieldSpec((), "int64")},
        new_items_filter=module.IsInCacheFilterFn(("id",)),
    )
    for ids, expected in (([1, 2], [1, 2, 0, 0]), ([2, 3], [1, 2, 3, 0]), ([3, 1], [1, 2, 3, 0])):
        query, x = batch_of(backend, sum(ids))
        features = {"x": x, "id": backend.to_native(np.asarray(ids))}
        handler.update_cache_and_compute_loss(double, query, double(features), features)
        np.testing.assert_array_equal(state_of(backend, handler)["id"], expected)


@HANDLED
@pytest.mark.parametrize("poison", [np.nan, np.inf, 70_000.0])
def test_embeddings_that_are_not_finite_in_the_cache_stay_out(backend, poison):
    """70,000 is finite in float64 and infinite in the float16 of this cache."""
    handler = handler_of(backend, dtype="float16")
    query, x = batch_of(backend, 0)
    handler.update_cache_and_compute_loss(double, query, double({"x": x}), {"x": x})
    before = state_of(backend, handler)

    def network(features):
        return double(features) * 0.0 + poison

    positives = np.array(backend.to_numpy(double({"x": x})))
    positives[1, 0] = poison
    with np.errstate(invalid="ignore"):  # the loss itself is not finite, as it should be
        handler.update_cache_and_compute_loss(
            network, query, backend.to_native(positives), {"x": x}
        )
    after = state_of(backend, handler)
    assert np.isfinite(after["embedding"]).all()
    np.testing.assert_array_equal(after["embedding"][:2], before["embedding"][:2])
    np.testing.assert_array_equal(after["age"], [1, 1, 0, EMPTY])
    assert float(backend.to_numpy(handler.metrics["nonfinite_count"])) == 3.0


@HANDLED
@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"item_network": failing}, RuntimeError),
        ({"item_network": lambda features: features["x"][:, :1]}, ShapeError),
        ({"features": {}}, NegcacheError),
        ({"features": {"x": "wrong rows"}}, ShapeError),
        ({"positive": "wrong rows"}, ShapeError),
        ({"rows": 5}, CapacityError),
    ],
)
def test_a_step_that_fails_leaves_the_cache_as_it_was(backend, change, error):
    handler = handler_of(backend)
    query, x = batch_of(backend, 0)
    handler.update_cache_and_compute_loss(double, query, double({"x": x}), {"x": x})
    before = state_of(backend, handler)
    query, x = batch_of(backend, 1, rows=change.get("rows", 2))
    positive, features = double({"x": x}), {"x": x}
    if change.get("positive"):
        positive = positive[:1]
    if "features" in change:
        features = {"x": x[:1]} if change["features"] else {}
    with pytest.raises(error):
        handler.update_cache_and_compute_loss(
            change.get("item_network", double), query, positive, features
        )
    assert_same_state(state_of(backend, handler), before)


@HANDLED
def test_features_narrower_than_their_field_may_stand_in(backend):
    """int32 ids for an int64 field: the encoder sees the field's dtype from the first step on."""
    module = backend.module
    specs = {"id": module.FieldSpec((), "int64"), "embedding": module.FieldSpec((1,), "float64")}
    handler = module.CacheLossHandler(
        module.CacheManager(specs, 4),
        module.CacheClassificationLoss("embedding", ("id",), generator=0),
        embedding_key="embedding",
        data_keys=("id",),
    )
    xp = module.CacheManager.backend.xp
    ids = backend.to_native(np.asarray([3, 4], np.int32))
    seen = []

    def network(features):
        seen.append(features["id"].dtype)
        return xp.astype(features["id"], xp.float64)[:, None]

    for _ in range(2):
        query = backend.to_native(np.ones((2, 1)))
        positive = xp.astype(ids, xp.float64)[:, None]
        handler.update_cache_and_compute_loss(network, query, positive, {"id": ids})
    assert seen == [xp.int64, xp.int64]


@HANDLED
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"in_batch_negatives": True, "top_k": 2},
        {"estimator": "shared", "in_batch_negatives": True},
        {"estimator": "exact_query", "staleness_correction": True, "num_samples": 2},
    ],
)
def test_an_empty_batch_is_fine(backend, options):
    loss = backend.module.CacheClassificationLoss("embedding", ("x",), generator=1, **options)
    handler = handler_of(backend, loss=loss)
    for rows in (2, 0, 1):
        query, x = batch_of(backend, rows, rows)
        loss = handler.update_cache_and_compute_loss(double, query, double({"x": x}), {"x": x})
        assert np.isfinite(float(loss))
    np.testing.assert_array_equal(np.sort(state_of(backend, handler)["age"])[-1], EMPTY)


@HANDLED
def test_several_caches_count_as_one_in_sorted_order(backend):
    multi, single = multi_of(backend), handler_of(backend, capacity=5)
    single.cache_loss.reducer = None
    query, x = batch_of(backend, 0, rows=5)
    rows = {"a": x[:3], "b": x[3:]}
    result_a = multi.retrieve(query[:2], {name: {"x": each} for name, each in rows.items()})
    assert not np.asarray(backend.to_numpy(result_a.drawn)).any()
    loss = multi.update_cache_and_compute_loss(
        double,
        query,
        double({"x": x}),
        {name: double({"x": each}) for name, each in rows.items()},
        {name: {"x": each} for name, each in rows.items()},
    )
    np.testing.assert_array_equal(backend.to_numpy(loss), 0.0)
    single.update_cache_and_compute_loss(double, query, double({"x": x}), {"x": x})
    query, x = batch_of(backend, 1)
    noise = backend.to_native(np.random.default_rng(0).random((2, 1, 2)))
    for_multi = multi.retrieve(query, {name: {"x": x} for name in "ab"}, noise=noise)
    for_single = single.retrieve(query, {"x": x}, noise=noise)
    np.testing.assert_array_equal(
        backend.to_numpy(for_multi.features["x"]), backend.to_numpy(for_single.features["x"])
    )
    np.testing.assert_allclose(
        backend.to_numpy(for_multi.log_partition), backend.to_numpy(for_single.log_partition)
    )
    slots, owned = (backend.numpy(part) for part in (for_multi.slots, for_multi.owned))
    joined = np.where(owned["a"], slots["a"], slots["b"] + 3)
    np.testing.assert_array_equal(joined, backend.numpy(for_single.slots)["cache"])
    assert (owned["a"] ^ owned["b"]).all()
    negatives = double(for_multi.features)
    result = multi.compute_loss(query, double({"x": x}), negatives, for_multi)
    multi.commit(
        result,
        {"a": double({"x": x[:1]}), "b": double({"x": x[1:]})},
        {"a": {"x": x[:1]}, "b": {"x": x[1:]}},
    )
    ages = {name: np.asarray(backend.to_numpy(cache.age)) for name, cache in multi.cache.items()}
    assert all((age == 0).sum() >= 1 for age in ages.values())
    assert all((age <= 1).all() for age in ages.values())


@HANDLED
def test_new_items_may_be_absent_for_one_cache(backend):
    multi = multi_of(backend)
    query, x = batch_of(backend, 0)
    for _ in range(2):
        loss = multi.update_cache_and_compute_loss(
            double,
            query,
            double({"x": x}),
            {"a": double({"x": x}), "b": double({"x": x[:0]})},
            {"a": {"x": x}, "b": {"x": x[:0]}},
        )
    assert (np.asarray(backend.to_numpy(loss)) > 0).all()
    assert (np.asarray(backend.to_numpy(multi.cache["b"].age)) == EMPTY).all()


@HANDLED
def test_metrics_say_what_happened(backend):
    handler = handler_of(backend)
    for seed in range(2):
        query, x = batch_of(backend, seed)
        loss = handler.update_cache_and_compute_loss(double, query, double({"x": x}), {"x": x})
    metrics = {key: float(backend.to_numpy(value)) for key, value in handler.metrics.items()}
    assert metrics["fill"] == 0.5
    assert metrics["masked_count"] == metrics["nonfinite_count"] == 0.0
    assert metrics["staleness"] == metrics["mean_age_drawn"] == 0.0
    assert metrics["interpretable_loss"] == pytest.approx(float(loss))
    assert 0.0 < metrics["positive_probability"] < 1.0
    assert 1.0 <= metrics["effective_negatives"] <= 2.0 + 1e-9 or metrics["effective_negatives"] < 8


@HANDLED
def test_handler_and_loss_must_agree_on_their_keys(backend):
    loss = backend.module.CacheClassificationLoss("embedding", ("x", "y"))
    with pytest.raises(OptionError, match=r"handler has data_keys=\('x',\), but its loss"):
        handler_of(backend, loss=loss)
