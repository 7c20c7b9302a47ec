"""Items by number: a slot holds a number, and what it stands for is fetched when it is drawn."""

from pathlib import Path

import negcache_torch as negcache
import pytest
import torch
from datasets import Dataset, DatasetDict
from negcache_sentence_transformers import NegativeCacheLoss
from negcache_sentence_transformers._known import NOTHING, RING
from programs import torchrun
from tiny_items import (
    WIDTH,
    Images,
    Sounds,
    make_clip,
    make_images,
    make_sounds,
    texts_to,
)
from tiny_transformer import make_model, make_texts, make_trainer, weights

ITEMS = 40
PROMPT = "w7 w8 "


def own(model, items, cache_size=16, **options):
    return NegativeCacheLoss(
        model, cache_size, features="index", items=items, own_loop=True, generator=0, **options
    )


def batch_of(model, items, numbers, seed=0, **options):
    """Columns of anchors, and of items by numbers (B, 1 + H)."""
    texts = make_texts(len(numbers), seed)
    task = {"task": "query"} if options.get("task") else {}
    anchors = model.preprocess(texts, **task)
    return [
        anchors,
        *(
            model.preprocess([items[row[place]] for row in numbers], **options)
            for place in range(len(numbers[0]))
        ),
    ]


def case(kind, folder):
    """A model, its items, and what their columns are made with."""
    if kind == "text":
        return make_model(folder), make_texts(ITEMS, seed=5), {"prompt": PROMPT}
    if kind == "CLIP":
        return make_clip(folder), make_images(ITEMS), {}
    if kind == "images":
        return texts_to(Images(192)), make_images(ITEMS), {"task": "document"}
    return texts_to(Sounds(4)), make_sounds(ITEMS), {"task": "document"}


KINDS = ("text", "CLIP", "images", "sounds")


def options_of(made):
    return {"prompt": made["prompt"]} if "prompt" in made else {}


def steps(count, size=4, columns=2):
    """Numbers (B, 1 + H) of batches: each item comes again and again."""
    pick = torch.Generator().manual_seed(0)
    for _ in range(count):
        yield torch.randperm(ITEMS, generator=pick)[: size * columns].reshape(size, columns)


@pytest.mark.parametrize("estimator", ["paper", "shared", "exact_query"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_drawn_is_fetched_as_it_was(tmp_path, kind, estimator):
    model, items, made = case(kind, tmp_path)
    loss = own(model, items, estimator=estimator, num_samples=2, **options_of(made))
    for step, numbers in enumerate(steps(8)):
        columns = batch_of(model, items, numbers.tolist(), step, **made)
        loss(columns, numbers).backward()
        assert loss.metrics["staleness"] < 1e-10, step
    cache = loss.handler.cache
    assert loss.metrics["fill"] == 1.0
    for slot in range(16):
        features = model.preprocess([items[int(cache.data["number"][slot])]], **made)
        expected = torch.nn.functional.normalize(model(features)["sentence_embedding"])[0]
        torch.testing.assert_close(cache.data["embedding"][slot], expected)
    assert cache.data["id"].tolist() == cache.data["number"].tolist()
    assert len(set(cache.data["id"].tolist())) == 16


@pytest.mark.parametrize("mini_batch_size", [None, 3])
def test_it_does_what_rows_of_tokens_do(tmp_path, mini_batch_size):
    texts, runs = make_texts(ITEMS, seed=5), []
    for index in (False, True):
        model = make_model(tmp_path)
        options = {"features": "index", "items": texts, "prompt": PROMPT} if index else {}
        loss = NegativeCacheLoss(
            model, 16, own_loop=True, generator=0, mini_batch_size=mini_batch_size, **options
        )
        optimizer, found = torch.optim.SGD(model.parameters(), 0.1), []
        for step, numbers in enumerate(steps(10)):
            columns = batch_of(model, texts, numbers.tolist(), step, prompt=PROMPT)
            value = loss(columns, numbers if index else None)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            found.append(value.item())
        cache = loss.handler.cache
        runs.append([found, weights(model), cache.data["embedding"], cache.age])
    torch.testing.assert_close(runs[1], runs[0], rtol=1e-4, atol=1e-5)


def data_of(items, columns=1, texts=None, count=ITEMS):
    """Anchors and items with their numbers, as a user of the trainer would have them."""
    anchors = make_texts(count) if texts is None else texts
    numbers = [
        [row, *((row + 7 * each) % ITEMS for each in range(1, columns))] for row in range(count)
    ]
    made = {"anchor": anchors, "positive": [items[row[0]] for row in numbers]}
    if columns > 1:
        made["negative"] = [items[row[1]] for row in numbers]
    return Dataset.from_dict({**made, "label": numbers if columns > 1 else [n for (n,) in numbers]})


@pytest.mark.parametrize("columns", [1, 2])
@pytest.mark.parametrize("kind", ["text", "CLIP", "images"])
def test_in_the_trainer_nothing_is_stale_and_evaluation_changes_nothing(tmp_path, kind, columns):
    model, items, made = case(kind, tmp_path / "model")
    data = data_of(items, columns)
    loss = NegativeCacheLoss(model, 16, features="index", items=data["positive"], generator=0)
    options = {"max_steps": 12, "learning_rate": 0.0}
    if "prompt" in made:
        options["prompts"] = {"anchor": "w3 ", "positive": PROMPT}
    if "task" in made:
        task = {"anchor": "query", "positive": "document", "negative": "document"}
        options["router_mapping"] = task
    trainer = make_trainer(tmp_path / "out", model, loss, data, **options)
    trainer.train()
    found = [row["cache_staleness"] for row in trainer.state.log_history if "loss" in row]
    assert len(found) == 12
    assert max(found) < 1e-10
    before = weights(loss)
    told = trainer.evaluate()["eval_loss"]
    assert told == trainer.evaluate()["eval_loss"] > 0
    # Items of an evaluation need no numbers; without, their own cached rows oppose other anchors.
    other = data_of(items, columns, make_texts(ITEMS, seed=9))
    told, without = (
        trainer.evaluate(each)["eval_loss"] for each in (other, other.remove_columns("label"))
    )
    if kind == "text":  # they are told by what they say
        assert without == told
    else:
        assert without > told
    torch.testing.assert_close(weights(loss), before, rtol=0, atol=0)


def test_a_training_goes_on_from_a_checkpoint_bit_for_bit(tmp_path):
    items, runs = make_images(ITEMS), []
    for folder, resume in (("whole", None), ("again", tmp_path / "whole" / "checkpoint-6")):
        model = make_clip(tmp_path / "model")
        data = data_of(items)
        loss = NegativeCacheLoss(model, 16, features="index", items=data["positive"], generator=0)
        trainer = make_trainer(
            tmp_path / folder, model, loss, data, max_steps=12, save_strategy="steps", save_steps=6
        )
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        runs.append({**weights(model), **weights(loss.handler), "losses": losses})
    assert runs[0]["losses"][0] != runs[0]["losses"][11]
    torch.testing.assert_close(runs[1], runs[0], rtol=0, atol=0)


def test_equal_texts_are_two_items_and_no_negatives_of_each_other(tmp_path):
    model = make_model(tmp_path)
    items = ["w1 w2", "w1 w2", "w3", "w4"]
    loss = own(model, items, in_batch_negatives=False)
    loss(batch_of(model, items, [[0]]), torch.tensor([0]))
    cache = loss.handler.cache
    value = loss(batch_of(model, items, [[1]], 1), torch.tensor([1]))
    assert value == 0.0  # item 0 says what item 1 does
    assert sorted(cache.data["number"][cache.age < 9].tolist()) == [0, 1]
    assert loss(batch_of(model, items, [[2]], 2), torch.tensor([2])) > 0.0


def test_an_empty_text_is_no_item(tmp_path):
    model, items = make_model(tmp_path), ["", "w1", "w3", "w4"]
    loss = own(model, items, mini_batch_size=2)
    sizes, embed = [], loss._embed
    loss._embed = lambda each, **given: sizes.append(len(each["input_ids"])) or embed(each, **given)
    value = loss(batch_of(model, items, [[0], [1], [2]]), torch.arange(3))
    assert sizes == [2, 1, 2, 2]  # anchors; items, and those drawn of an empty cache: the same
    value.backward()
    assert torch.isfinite(value)
    assert loss.metrics["empty"] == 1
    cache = loss.handler.cache
    assert sorted(cache.data["number"][cache.age < 9].tolist()) == [1, 2]


def test_an_item_is_no_negative_under_its_number_whatever_it_is_like(tmp_path):
    """Such as texts cut anew each time."""
    model, items = make_model(tmp_path), ["w1 w2", "w3"]
    loss = own(model, items, check_items=False)
    loss(batch_of(model, items, [[0]]), torch.tensor([0]))
    assert loss(batch_of(model, ["w2", "w3"], [[0]], 1), torch.tensor([0])) == 0.0
    assert loss(batch_of(model, items, [[1]], 2), torch.tensor([1])) > 0.0


@pytest.mark.parametrize("kind", ["CLIP", "sounds"])
def test_an_anchor_that_is_no_text_is_known_again(tmp_path, kind):
    """Its second positive is not opposed by its first; a text is the item here."""
    if kind == "CLIP":
        model, anchors, task = make_clip(tmp_path), make_images(3, seed=1), [{}, {}]
    else:
        model = texts_to(Sounds(4))
        anchors = sorted(make_sounds(3, seed=1), key=lambda each: len(each["array"]))
        task = [{"task": "document"}, {"task": "query"}]
    items = make_texts(4)
    loss = own(model, items, in_batch_negatives=False)

    def step(anchor, number, beside=()):
        column = model.preprocess([anchors[anchor], *beside], **task[0])
        some = {k: v[:1] if isinstance(v, torch.Tensor) else v for k, v in column.items()}
        item = model.preprocess([items[number]], **task[1])
        return loss([some, item], torch.tensor([number])).item()

    step(0, 0)
    assert step(0, 1, anchors[2:]) == 0.0  # padded otherwise
    assert step(1, 2) > 0.0
    rings = torch.stack([loss.handler.cache.data[key] for key in RING], 1)
    assert len(set(rings[rings != NOTHING].tolist()) - {0}) == 2


def test_what_is_no_number_of_an_item_is_refused_and_changes_nothing(tmp_path):
    model, items = make_clip(tmp_path), make_images(ITEMS)
    loss = own(model, items)
    numbers = torch.arange(8).reshape(4, 2)
    pairs, triplets = (batch_of(model, items, numbers[:, :h].tolist()) for h in (1, 2))
    loss(triplets, numbers)
    other = batch_of(model, items, numbers.flip(0)[:, :1].tolist())
    cases = [
        (pairs, None, negcache.KeysError, "has no numbers: features='index' takes"),
        (pairs, [0, 1, 2, 3], negcache.KindError, "labels is a list: expected a tensor"),
        (pairs, numbers[:, 0].double(), negcache.DTypeError, "float64: expected integers"),
        (pairs, numbers[:, 0] > 1, negcache.DTypeError, "bool: expected integers"),
        (triplets, numbers[:, 0], negcache.ShapeError, r"\(4,\), .* 4 rows with 1 columns"),
        (pairs, numbers[:3, 0], negcache.ShapeError, r"labels has shape \(3,\)"),
        (pairs, numbers[:, 0] - 1, negcache.OptionError, "number -1, and items has 40: .* 0 to 39"),
        (pairs, numbers[:, 0] + 36, negcache.OptionError, "has the number 40, and items"),
        (other, numbers[:, 0], negcache.OptionError, "column 2 is to be item .* 'pixel_values'"),
    ]
    before = {key: value.clone() for key, value in loss.state_dict().items()}
    for columns, labels, error, text in cases:
        with pytest.raises(error, match=text):
            loss(columns, labels)
    loss.rows.items = items[:5]
    with pytest.raises(negcache.OptionError, match="the cache has item 7, and items has 5"):
        loss(pairs, numbers[:, 0])
    torch.testing.assert_close(dict(loss.state_dict()), before, rtol=0, atol=0)


def test_a_prompt_or_length_that_columns_do_not_have_is_noticed(tmp_path):
    model, items = make_model(tmp_path), make_texts(ITEMS)
    numbers = torch.tensor([[8, 17]])  # of many words
    made = [({"prompt": PROMPT}, {}), ({}, {"prompt": PROMPT}), ({"max_length": 5}, {})]
    for column, options in made:
        loss = own(model, items, **options)
        with pytest.raises(negcache.OptionError, match="are prompt and max_length those of"):
            loss(batch_of(model, items, numbers.tolist(), **column), numbers)
    for column in ({"prompt": PROMPT}, {"max_length": 5}):
        loss = own(model, items, **column)
        loss(batch_of(model, items, numbers.tolist(), **column), numbers)
        loss(batch_of(model, items, [[3, 4]], **column), torch.tensor([[3, 4]])).backward()
        assert loss.metrics["staleness"] < 1e-10


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
            r"has \['items'\], which features='index' takes",
        ),
    ):
        with pytest.raises(error, match=text):
            own(model, **{"items": items, **options}) if "features" not in options else (
                NegativeCacheLoss(model, 8, items=items, **options)
            )
    loss = NegativeCacheLoss(model, 8, own_loop=True)
    columns = batch_of(model, items, [[0], [1]])
    with pytest.raises(negcache.OptionError, match=r"integer labels, and .* features='content'"):
        loss(columns, torch.tensor([0, 1]))
    loss(
        columns, torch.tensor([0.5, 1.0])
    )  # scores, which MultipleNegativesRankingLoss ignores too


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


def test_data_sets_share_items_and_have_slots_of_their_own(tmp_path):
    model, items = make_clip(tmp_path / "model"), make_images(ITEMS)
    data = data_of(items)
    parts = DatasetDict(one=data.select(range(20)), two=data.select(range(10, 30)))
    loss = NegativeCacheLoss(
        model, 64, features="index", items=data["positive"], group_by_dataset=True, generator=0
    )
    options = {"max_steps": 10, "learning_rate": 0.0}
    trainer = make_trainer(tmp_path / "out", model, loss, parts, **options)
    trainer.train()
    cache = loss.handler.cache
    written = cache.age < 100
    assert len(set(cache.data["id"][written].tolist())) == int(written.sum()) == 40
    assert set(cache.data["number"][written].tolist()) == set(range(30))
    found = [row["cache_staleness"] for row in trainer.state.log_history if "loss" in row]
    assert max(found) < 1e-10


def test_two_processes(tmp_path):
    torchrun(2, Path(__file__).with_name("two_processes_index.py"), tmp_path)
