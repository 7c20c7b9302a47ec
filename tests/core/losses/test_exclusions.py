"""Rows that must not oppose a query: what is drawn, counted, and asked of the user."""

import numpy as np
import pytest
from backends import EAGER, NUMPY
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import seeds

from negcache_core import CacheClassificationLoss, FieldSpec, NegativeCache
from negcache_core.errors import OptionError
from negcache_core.losses.estimators import ESTIMATORS

SPECS = {
    "x": FieldSpec((3,), "float64"),
    "item": FieldSpec((), "int64"),
    "query": FieldSpec((), "int32"),
    "group": FieldSpec((), "int32"),
    "embedding": FieldSpec((3,), "float64"),
}
OPTIONS = {"id_keys": ("item", "query"), "group_key": "group", "margin": 0.2, "scale": 2.0}


def batch_of(rng, rows):
    return {
        "x": rng.normal(size=(rows, 3)),
        "item": rng.integers(0, 40, rows),
        "query": rng.integers(0, 40, rows).astype(np.int32),
        "group": rng.integers(0, 3, rows).astype(np.int32),
    }


@pytest.mark.parametrize("estimator", sorted(ESTIMATORS))
@pytest.mark.parametrize("name", ["numpy", "torch"])
@settings(max_examples=10)
@given(seed=seeds, capacity=st.sampled_from([7, 150, 300]), rows=st.integers(1, 5))
def test_in_a_run_of_steps_no_drawn_row_ever_opposes_its_query(
    name, estimator, seed, capacity, rows
):
    backend, rng = EAGER[name], np.random.default_rng(seed)
    module, numpy = backend.module, backend.numpy
    handler = module.CacheLossHandler(
        module.CacheManager(SPECS, capacity),
        module.CacheClassificationLoss(
            "embedding",
            ("x",),
            estimator=estimator,
            num_samples=3,
            in_batch_negatives=True,
            tile_bytes=1,  # the smallest tiles
            generator=0,
            **OPTIONS,
        ),
    )
    drift, seen = rng.normal(size=(3, 3)) / 20, 0
    for step in range(60 // rows):
        features, query = batch_of(rng, rows), rng.normal(size=(rows, 3))
        tower = np.eye(3) + step * drift
        native, positive = backend.native(features), backend.to_native(features["x"] @ tower)
        more = np.stack([features["item"], features["item"] + 1], axis=1)
        cache = numpy(handler.cache)
        rows_of = {key: np.array(value) for key, value in cache.data.items()}
        drawn = handler.retrieve(
            backend.to_native(query),
            native,
            pos_item_embeddings=positive,
            positive_ids={"item": backend.to_native(more)},
        )
        found = numpy(drawn)
        fresh = np.asarray(found.features["x"]) @ tower
        result = handler.compute_loss(
            backend.to_native(query), positive, backend.to_native(fresh), drawn
        )
        assert np.isfinite(numpy(result.loss))
        scores = 2.0 * query @ rows_of["embedding"].T
        ceiling = 2.0 * (query * (features["x"] @ tower)).sum(axis=1) + 0.2
        counts = (rows_of["item"][None, :, None] != more[:, None, :]).all(axis=2)
        for key in ("query", "group"):
            same = rows_of[key][None, :] == features[key][:, None]
            counts &= same if key == "group" else ~same
        counts &= (scores <= ceiling[:, None]) & (np.asarray(cache.age) < 2**31 - 1)
        slots = np.asarray(found.slots["cache"]).reshape(rows, 3)
        for row in range(rows):
            assert found.drawn[row].all() == found.drawn[row].any() == counts[row].any()
            if counts[row].any():
                assert counts[row, slots[row]].all()
                seen += 3
            else:  # its own positive stands in, and its weight is 0
                np.testing.assert_array_equal(
                    np.asarray(found.features["x"]).reshape(rows, 3, 3)[row],
                    np.tile(features["x"][row], (3, 1)),
                )
        with np.errstate(divide="ignore"):
            whole = np.log(np.where(counts, np.exp(scores), 0.0).sum(axis=1))
        np.testing.assert_allclose(found.log_partition, whole, rtol=1e-9)
        handler.commit(result, positive, native)
    assert seen or capacity == 7


def cache_of(**fields):
    rows = np.arange(8.0).reshape(4, 2) / 4
    return NegativeCache({"x": rows, "embedding": rows, **fields}, np.zeros(4, np.int32))


ROWS = np.asarray([[1.0, 0.5], [0.2, 1.0]])
IDS = {"item": np.asarray([1, 2, 3, 3]), "query": np.asarray([5, 5, 6, 7])}
FEATURES = {"x": ROWS, "item": np.asarray([3, 9]), "query": np.asarray([8, 5])}


def embed(features):
    return features["x"]


def loss_of(**options):
    return CacheClassificationLoss("embedding", ("x",), **{"generator": 0, **options})


def test_one_id_key_is_id_keys_of_one():
    cache, results = cache_of(**IDS), []
    for options in ({"id_key": "item"}, {"id_keys": ["item"]}):
        loss = loss_of(estimator="shared", in_batch_negatives=True, **options)
        assert (loss.id_key, loss.id_keys) == ("item", ("item",))
        results.append(loss(embed, ROWS, ROWS, cache, pos_features=FEATURES))
    assert results[0].loss == results[1].loss
    assert results[0].training_loss == results[1].training_loss
    assert (loss_of().id_key, loss_of().id_keys, loss_of(id_keys=()).id_keys) == (None, (), ())


@pytest.mark.parametrize("estimator", sorted(ESTIMATORS))
def test_of_several_ids_any_one_will_do(estimator):
    loss = loss_of(id_keys=("item", "query"), estimator=estimator, num_samples=32)
    drawn = loss.retrieve(ROWS, cache_of(**IDS), pos_features=FEATURES)
    slots = drawn.slots.reshape(2, 32)
    assert [set(row) for row in slots] == [{0, 1}, {2, 3}]


def test_hard_negatives_are_held_to_the_same_rules():
    """Of four, one has the positive's item, one another group, and one scores too high."""
    hard = np.asarray([[[1.0, 0.0], [0.5, 0.0], [9.0, 0.0], [0.1, 0.1]]])
    features = {"item": np.asarray([[3, 4, 5, 6]]), "group": np.asarray([[0, 1, 0, 0]])}
    own = {"x": ROWS[:1], "item": np.asarray([3]), "group": np.asarray([0])}
    cache = cache_of(item=np.full(4, 3), group=np.zeros(4, int))  # nothing is left of it
    loss = loss_of(id_key="item", group_key="group", margin=1.0)

    def value(**arguments):
        return loss(
            embed,
            ROWS[:1],
            ROWS[:1],
            cache,
            pos_features=own,
            hard_negative_embeddings=hard,
            **arguments,
        ).interpretable_loss

    scores = np.concatenate([(ROWS[:1] * ROWS[:1]).sum(1), hard[0] @ ROWS[0]])

    def expected(*kept):
        return np.logaddexp.reduce(scores[[0, *kept]]) - scores[0]

    np.testing.assert_allclose(value(hard_negative_features=features), expected(4))
    np.testing.assert_allclose(value(), expected(1, 2, 4))  # the margin needs no field


def test_in_evaluation_and_by_hand_the_margin_is_the_same():
    loss, cache = loss_of(margin=0.1), cache_of()
    result = loss.evaluate(None, ROWS, ROWS, cache)
    drawn = loss.retrieve(ROWS, cache, pos_doc_embeddings=ROWS)
    given = loss.loss_from_negatives(ROWS, ROWS, drawn.features["x"], drawn)
    scores, own = ROWS @ cache.data["x"].T, (ROWS * ROWS).sum(axis=1)
    kept = np.where(scores <= own[:, None] + 0.1, scores, -np.inf)
    assert 0 < np.isinf(kept).sum() < kept.size
    expected = np.logaddexp(own, np.logaddexp.reduce(kept, axis=1)) - own
    for each in (result, given):
        np.testing.assert_allclose(each.interpretable_loss, expected.mean(), rtol=1e-12)


@pytest.mark.parametrize("name", ["numpy", "torch"])
@given(seed=seeds, queries=st.integers(1, 3), size=st.sampled_from([1, 100, 256]))
def test_the_readout_of_a_tile_is_the_mean_under_the_softmax(name, seed, queries, size):
    """Also with rows left out, blocks without any, and scores whose exponentials underflow."""
    backend, rng = EAGER[name], np.random.default_rng(seed)
    verbs = backend.module.CacheManager.backend
    scores = rng.normal(size=(256, queries)) * rng.choice([1.0, 300.0])
    written = rng.random(256) < rng.choice([0.0, 0.02, 0.9, 1.0])
    written[size:] = False
    scores[rng.random(scores.shape) < rng.choice([0.0, 0.5, 1.0])] = -np.inf
    rows = rng.normal(size=(size, 2))
    rows[~written[:size]] = np.nan  # of an empty slot, which may hold anything
    counting = np.where(written[:, None], scores, -np.inf)
    parts = [backend.to_native(each) for each in (scores.copy(), rows.copy(), written)]
    weights, total, mean = map(backend.numpy, verbs.read_blocks(*parts, 128))
    with np.errstate(divide="ignore"):
        whole = np.logaddexp.reduce(counting, axis=0)
        by_block = np.logaddexp.reduce(counting.reshape(2, 128, queries), axis=1)
    np.testing.assert_allclose(weights, by_block, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(total, whole, rtol=1e-12, atol=1e-12)
    law = np.exp(counting - np.where(np.isfinite(whole), whole, 0.0))[:size]
    known = np.where(written[:size, None], rows, 0.0)
    np.testing.assert_allclose(mean, law.T @ known, rtol=1e-9, atol=1e-12)


def test_a_retrieval_of_a_loss_with_other_keys_is_refused():
    cache = cache_of(**IDS)
    drawn = loss_of(id_key="item").retrieve(ROWS, cache, pos_features=FEATURES)
    hard = {"hard_negative_embeddings": ROWS[:, None], "hard_negative_features": FEATURES}
    with pytest.raises(OptionError, match=r"1 fields .* but this loss has 2"):
        loss_of(id_keys=("item", "query")).loss_from_negatives(
            ROWS, ROWS, drawn.features["x"], drawn, **hard
        )


def test_the_kept_record_is_checked_in_phase_two():
    loss = loss_of(id_key="item")
    drawn = loss.retrieve(ROWS, cache_of(**IDS), pos_features=FEATURES)
    assert NUMPY.numpy(drawn).own.ids[0].tolist() == [[3], [9]]
    for own, message in (
        (None, "retrieval has no own"),
        ("nothing", "retrieval.own is a str"),
        (drawn.own._replace(ids=(np.zeros(3, int),)), "retrieval.own.ids has shape"),
        (drawn.own._replace(ids=(np.zeros((2, 1)),)), "retrieval.own.ids has dtype"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            loss.loss_from_negatives(ROWS, ROWS, drawn.features["x"], drawn._replace(own=own))
