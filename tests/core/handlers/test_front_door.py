"""NegativeCacheLoss: the fields that an example batch has, and what is refused."""

import copy

import numpy as np
import pytest
from backends import BACKENDS, EAGER
from hypothesis import given
from hypothesis import strategies as st

import negcache_core as negcache
from negcache_core import FieldSpec

DTYPES = ("bool", "int8", "int32", "int64", "uint8", "float32", "float64")
TOKENS = np.zeros((3, 2), np.int64)


def loss_of(features=None, embedding=4, backend=BACKENDS["numpy"], **options):
    features = {"tokens": TOKENS} if features is None else features
    return backend.module.NegativeCacheLoss(8, backend.native(features), embedding, **options)


@pytest.mark.parametrize("backend", EAGER.values(), ids=lambda backend: backend.name)
@given(
    rows=st.lists(
        st.tuples(st.lists(st.integers(0, 3), max_size=3), st.sampled_from(DTYPES)),
        min_size=1,
        max_size=3,
    ),
    count=st.integers(0, 4),
)
def test_an_example_batch_and_specs_of_its_rows_make_the_same_cache(backend, rows, count):
    arrays = {f"f{n}": np.zeros((count, *shape), dtype) for n, (shape, dtype) in enumerate(rows)}
    specs = {f"f{n}": FieldSpec(tuple(shape), dtype) for n, (shape, dtype) in enumerate(rows)}
    embedding = backend.to_native(np.zeros((count, 4), np.float32))
    by_example = loss_of(arrays, embedding, backend).cache
    by_spec = backend.module.NegativeCacheLoss(8, specs, 4).cache
    both = [backend.numpy(each) for each in (by_example, by_spec)]
    assert [set(each.data) for each in both] == [{*arrays, "embedding"}] * 2
    for key, table in both[0].data.items():
        assert (table.shape, table.dtype) == (both[1].data[key].shape, both[1].data[key].dtype)


def test_the_dtype_of_the_example_is_stored_and_a_width_alone_is_float32():
    stored = [loss_of(embedding=each).cache.data["embedding"] for each in (np.zeros((3, 4)), 4)]
    assert [(each.shape, str(each.dtype)) for each in stored] == [
        ((8, 4), "float64"),
        ((8, 4), "float32"),
    ]


def test_labels_are_stored_and_the_network_does_not_get_them():
    seen = []

    def network(features):
        seen.append(sorted(features))
        return np.ones((len(features["tokens"]), 4))

    loss_fn = loss_of(labels={"id": np.arange(3)}, generator=0)
    items = np.ones((3, 4))
    for _ in range(2):
        loss_fn(network, items, items, {"tokens": TOKENS}, labels={"id": np.arange(3)})
    loss_fn(network, items, items, {"tokens": TOKENS, "id": np.arange(3)})
    assert seen == [["tokens"]] * 3
    assert (
        loss_fn.cache.data["id"].tolist() == [0, 1, 2, 0, 1, 2, 0, 1] or loss_fn.cache.age.max() < 9
    )
    with pytest.raises(negcache.KeysError, match="both have"):
        loss_fn(network, items, items, {"tokens": TOKENS, "id": TOKENS}, labels={"id": TOKENS})


def test_a_field_may_be_called_embedding():
    loss_fn = loss_of({"embedding": np.zeros((3, 7), np.float32)})
    assert loss_fn.embedding_key == "item_embedding"
    assert loss_fn.data_keys == ("embedding",)
    assert loss_fn.cache.data["item_embedding"].shape == (8, 4)


@pytest.mark.parametrize(
    ("options", "estimator"),
    [
        ({}, "exact_query"),
        ({"score_transform": np.tanh}, "shared"),
        ({"top_k": 2}, "shared"),
        ({"retrieval_fn": negcache.MaxScoreRetrievalFn()}, "paper"),
        ({"estimator": "paper"}, "paper"),
    ],
)
def test_auto_takes_the_least_noisy_estimator_that_goes_with_the_options(options, estimator):
    assert loss_of(**options).cache_loss.estimator == estimator


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"features": {}}, negcache.KeysError, "features is empty"),
        ({"features": [1]}, negcache.KindError, "features is a list"),
        ({"features": {"tokens": "text"}}, negcache.KindError, "expected an example array"),
        ({"features": {3: TOKENS}}, negcache.KeysError, "non-empty strings"),
        ({"features": {"tokens": np.asarray(3)}}, negcache.ShapeError, "example batch"),
        ({"features": {"x": np.asarray(["a"])}}, negcache.DTypeError, "token ids"),
        ({"labels": {"tokens": TOKENS}}, negcache.KeysError, "name each field once"),
        ({"labels": {"id": np.arange(2)}}, negcache.ShapeError, "row counts"),
        ({"embedding": np.zeros((2, 4))}, negcache.ShapeError, "row counts"),
        (
            {"embedding": np.zeros((3, 4), np.int64)},
            negcache.DTypeError,
            "floating item embeddings",
        ),
        ({"embedding": np.zeros((3, 4, 2))}, negcache.ShapeError, "embedding has rows of shape"),
        ({"embedding": 0}, negcache.ShapeError, "at least 1"),
        ({"embedding": "4"}, negcache.KindError, "embedding"),
        ({"embedding": None}, negcache.KindError, "embedding"),
        ({"cache_size": 0}, negcache.CapacityError, "at least one slot"),
        ({"scale": "20"}, negcache.KindError, "scale"),
        ({"id_keys": ["item"]}, negcache.KeysError, r"names \['item'\].*labels=\{'item': …\}"),
        (
            {"labels": {"id": np.ones(3)}, "id_keys": ["id"]},
            negcache.DTypeError,
            "one integer number for each row",
        ),
        (
            {"labels": {"g": TOKENS}, "group_key": "g"},
            negcache.DTypeError,
            r"'g' of row shape \(2,\)",
        ),
        (
            {"labels": {"q": np.arange(3)}, "log_frequency_key": "q"},
            negcache.DTypeError,
            "one floating number",
        ),
        ({"group_key": "g", "unique_key": "u"}, negcache.KeysError, r"names \['g', 'u'\]"),
    ],
)
def test_what_cannot_work_is_refused_in_words(arguments, error, words):
    given = {"cache_size": 8, "features": {"tokens": TOKENS}, "embedding": 4, **arguments}
    with pytest.raises(error, match=words):
        negcache.NegativeCacheLoss(**given)


def test_print_says_what_the_cache_holds_and_what_the_loss_does():
    loss_fn = loss_of(embedding=np.zeros((3, 4)), scale=20.0, num_samples=2, generator=0)
    assert repr(loss_fn) == (
        "NegativeCacheLoss(8 slots, 0 written, 384 bytes: tokens int64 (2,), embedding float64 "
        "(4,);\n  estimator exact_query with in-batch negatives, scale 20, num_samples 2, "
        "max_staleness 0.2; no step yet)"
    )
    items = np.ones((3, 4))
    loss_fn(lambda features: items[:2].repeat(3, 0), items, items, {"tokens": TOKENS})
    assert "3 written" in str(loss_fn)
    assert "staleness 0.000" in str(loss_fn)
    assert repr(loss_fn.cache) == (
        "NegativeCache(8 slots, 3 written, 384 bytes: tokens int64 (2,), embedding float64 (4,))"
    )
    assert repr(loss_fn.cache_manager) == (
        "CacheManager(8 slots, 384 bytes: tokens int64 (2,), embedding float64 (4,))"
    )
    trained = negcache.CacheClassificationLoss("e", ("a", "b"), scale=lambda: 3.0)
    assert repr(trained) == (
        "CacheClassificationLoss(e of a and b: estimator paper, scale 3, given by a function or a "
        "tensor)"
    )


def test_a_copy_goes_its_own_way():
    loss_fn = loss_of(embedding=np.zeros((3, 4)), generator=0)
    other, items = copy.deepcopy(loss_fn), np.ones((3, 4))
    loss_fn(lambda features: items, items, items, {"tokens": TOKENS})
    assert (other.cache.age == negcache.EMPTY).all()
