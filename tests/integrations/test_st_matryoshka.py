"""The sentence-transformers loss at several widths: its law, and what does not go with it."""

import negcache_torch as negcache
import pytest
import torch
from negcache_sentence_transformers import NegativeCacheLoss
from sentence_transformers.sentence_transformer.losses import (
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from tiny_transformer import (
    columns,
    gradients,
    make_model,
    make_texts,
)
from torch.nn.functional import cross_entropy, normalize

WIDTHS, FACTORS = (16, 8, 4), (1.0, 0.5, 2.0)


@pytest.fixture
def model(tmp_path):
    return make_model(tmp_path / "model", dtype=torch.float64)


def loss_of(model, **options):
    options = {"matryoshka_dims": WIDTHS, "matryoshka_weights": FACTORS, **options}
    return NegativeCacheLoss(
        model, 32, own_loop=True, generator=0, dtype=torch.float64, max_staleness=None, **options
    )


def embed(model, texts):
    return model(dict(model.preprocess(texts)))["sentence_embedding"]


def test_the_first_step_is_that_of_the_librarys_wrapper(model):
    texts = make_texts(10)
    batch = columns(model, texts[:5], texts[5:])
    theirs = MatryoshkaLoss(model, MultipleNegativesRankingLoss(model), list(WIDTHS), list(FACTORS))
    expected = theirs(columns(model, texts[:5], texts[5:]), None)
    expected_gradients = gradients(model, expected)
    # The wrapper leaves its mark on the model's forward.
    vars(model).pop("forward", None)
    found = loss_of(model)(batch)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(model, found), expected_gradients)


@pytest.mark.parametrize("estimator", ["shared", "exact_query"])
def test_the_value_is_the_weighted_sum_of_full_softmaxes_and_no_row_is_stale(model, estimator):
    texts, ours = make_texts(24), loss_of(model, estimator=estimator)
    cached = []
    for start in range(0, 24, 8):
        anchors, positives = texts[start : start + 4], texts[start + 4 : start + 8]
        query, own, old = (
            embed(model, each) if each else torch.empty(0, 16, dtype=torch.float64)
            for each in (anchors, positives, cached)
        )
        expected = sum(
            factor
            * cross_entropy(
                20.0
                * normalize(query[:, :width], dim=1)
                @ normalize(torch.cat([own, old])[:, :width], dim=1).T,
                torch.arange(4),
            )
            for width, factor in zip(WIDTHS, FACTORS, strict=True)
        )
        torch.testing.assert_close(ours(columns(model, anchors, positives)), expected)
        if cached:
            assert ours.metrics["staleness"] < 1e-10
        cached += positives


def test_the_card_and_what_is_refused(model):
    told = loss_of(model).get_config_dict()
    assert (told["matryoshka_dims"], told["matryoshka_weights"]) == (
        WIDTHS[::-1],
        FACTORS[::-1],
    )
    both = ("query_to_doc", "doc_to_query")
    with pytest.raises(negcache.OptionError, match="matryoshka_dims does not work with directions"):
        loss_of(model, directions=both)
    with pytest.raises(negcache.ShapeError, match="17"):
        loss_of(model, matryoshka_dims=(17,), matryoshka_weights=None)
    with pytest.raises(negcache.OptionError, match="paper"):
        loss_of(model, estimator="paper")
