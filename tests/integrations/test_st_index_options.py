"""Items by number: what is refused, and what a slot costs."""

import negcache_torch as negcache
import pytest
import torch
from negcache_sentence_transformers import NegativeCacheLoss
from test_st_index import ITEMS, PROMPT, batch_of, own
from tiny_items import WIDTH, Patches, make_clip, make_images, texts_to
from tiny_transformer import make_model, make_texts


def test_what_is_no_number_of_an_item_is_refused_and_changes_nothing(tmp_path):
    model, items = make_clip(tmp_path), make_images(ITEMS)
    loss = own(model, items)
    numbers = torch.arange(8).reshape(4, 2)
    pairs, triplets = (batch_of(model, items, numbers[:, :h].tolist()) for h in (1, 2))
    loss(triplets, numbers)
    other = batch_of(model, items, numbers.flip(0)[:, :1].tolist())
    cases = [
        (pairs, None, negcache.KeysError, "has no numbers: features='index' needs"),
        (pairs, [0, 1, 2, 3], negcache.KindError, "labels is a list: expected a tensor"),
        (pairs, numbers[:, 0].double(), negcache.DTypeError, "float64: expected integers"),
        (pairs, numbers[:, 0] > 1, negcache.DTypeError, "bool: expected integers"),
        (triplets, numbers[:, 0], negcache.ShapeError, r"\(4,\), .* 4 rows and 1 columns"),
        (pairs, numbers[:3, 0], negcache.ShapeError, r"labels has shape \(3,\)"),
        (pairs, numbers[:, 0] - 1, negcache.OptionError, "number -1, but items has 40: .* 0 to 39"),
        (pairs, numbers[:, 0] + 36, negcache.OptionError, "has the number 40, but items"),
        (other, numbers[:, 0], negcache.OptionError, "column 2 should be item .* 'pixel_values'"),
    ]
    before = {key: value.clone() for key, value in loss.state_dict().items()}
    for columns, labels, error, text in cases:
        with pytest.raises(error, match=text):
            loss(columns, labels)
    loss.rows.items = items[:5]
    with pytest.raises(negcache.OptionError, match="the cache has item 7, but items has 5"):
        loss(pairs, numbers[:, 0])
    torch.testing.assert_close(dict(loss.state_dict()), before, rtol=0, atol=0)


def test_a_prompt_or_length_that_columns_do_not_have_is_noticed(tmp_path):
    model, items = make_model(tmp_path), make_texts(ITEMS)
    numbers = torch.tensor([[8, 17]])  # of many words
    made = [({"prompt": PROMPT}, {}), ({}, {"prompt": PROMPT}), ({"max_length": 5}, {})]
    for column, options in made:
        loss = own(model, items, **options)
        with pytest.raises(negcache.OptionError, match="do prompt and max_length match"):
            loss(batch_of(model, items, numbers.tolist(), **column), numbers)
    for column in ({"prompt": PROMPT}, {"max_length": 5}):
        loss = own(model, items, **column)
        loss(batch_of(model, items, numbers.tolist(), **column), numbers)
        loss(batch_of(model, items, [[3, 4]], **column), torch.tensor([[3, 4]])).backward()
        assert loss.metrics["staleness"] < 1e-10


def test_features_without_rows_work_but_in_mini_batches(tmp_path):
    """Their anchors are known by their positives' numbers."""
    images, items = make_images(6), make_texts(ITEMS)
    for size in (None, 2):
        model = texts_to(Patches(192))
        loss = own(model, items, mini_batch_size=size, in_batch_negatives=False)
        for step, start in enumerate((0, 3)):
            anchors = model.preprocess(images[start : start + 3], task="document")
            numbers = torch.arange(start, start + 6).reshape(2, 3).T
            columns = [
                anchors,
                *(model.preprocess([items[n] for n in each], task="query") for each in numbers.T),
            ]
            if size is None:
                assert torch.isfinite(loss(columns, numbers)), step
                continue
            with pytest.raises(
                negcache.KindError, match=r"'pixel_values'.: leave out mini_batch_size"
            ):
                loss(columns, numbers)


def test_options_are_checked(tmp_path):
    model, items = make_model(tmp_path), make_texts(4)
    for options, error, text in (
        ({"items": None}, negcache.KindError, "items is a NoneType: expected a sequence"),
        ({"items": "w1 w2"}, negcache.KindError, "items is a str"),
        ({"items": {0: "w1"}}, negcache.KindError, "items is a dict"),
        ({"items": []}, negcache.OptionError, "items is empty"),
        ({"prompt": 3}, negcache.KindError, "prompt is 3: expected a text"),
        ({"max_length": 0}, negcache.OptionError, "max_length is 0: expected a positive number"),
        (
            {"features": "numbers"},
            negcache.OptionError,
            "features is 'numbers': expected 'content'",
        ),
        (
            {"features": "content"},
            negcache.OptionError,
            r"has \['items'\], which only features='index' uses",
        ),
    ):
        with pytest.raises(error, match=text):
            own(model, **{"items": items, **options}) if "features" not in options else (
                NegativeCacheLoss(model, 8, items=items, **options)
            )
    loss = NegativeCacheLoss(model, 8, own_loop=True)
    columns = batch_of(model, items, [[0], [1]])
    for labels in (torch.tensor([0.5, 1.0]), torch.tensor([0, 1])):
        loss(columns, labels)  # MultipleNegativesRankingLoss has no use for them either
    with pytest.raises(
        negcache.OptionError, match="features='index' does not work with directions"
    ):
        own(model, items, directions=("query_to_doc", "doc_to_query"))


def test_a_slot_costs_its_embedding_and_some_numbers(tmp_path):
    loss = own(make_clip(tmp_path), make_images(ITEMS), 1_000)
    cache = loss.handler.cache
    tables = [*cache.data.values(), cache.age]
    taken = sum(each.element_size() * each.numel() for each in tables) / 1_000
    # an embedding; how it is made, number, id, content, four anchors, age
    assert taken == 4 * WIDTH + 192 + 8 + 8 + 8 + 4 * 8 + 4
    assert f"features='index', items={ITEMS}, {int(taken)} bytes a slot" in repr(loss)
    told = loss.get_config_dict()
    assert told["features"] == "index"
    assert told["items"] == ITEMS
    assert "max_length" not in told or told["max_length"] is None
