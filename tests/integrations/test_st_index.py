"""Items by number: a slot holds a number, and what it stands for is fetched when it is drawn."""

from pathlib import Path

import negcache_torch as negcache
import pytest
import torch
from datasets import Dataset, DatasetDict
from negcache_sentence_transformers import NegativeCacheLoss, keep_cache
from negcache_sentence_transformers._known import NOTHING, RING
from ranks import run_program
from tiny_items import (
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
    sizes = []
    model.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0]["input_ids"])))
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


def test_data_sets_may_have_prompts_of_their_own(tmp_path):
    model, items = make_model(tmp_path / "model"), make_texts(ITEMS, seed=5)
    data = data_of(items)
    parts = DatasetDict(one=data.select(range(20)), two=data.select(range(10, 30)))
    loss = NegativeCacheLoss(model, 16, features="index", items=items, generator=0)
    trainer = make_trainer(
        tmp_path / "out",
        model,
        loss,
        parts,
        max_steps=12,
        learning_rate=0.0,
        prompts={"one": {"positive": PROMPT}, "two": {"anchor": PROMPT, "positive": "w9 "}},
    )
    trainer.data_collator.max_length = 8
    for _ in range(2):  # and kept anew
        trainer.train()
        found = [row["cache_staleness"] for row in trainer.state.log_history if "loss" in row]
        assert len(found) == 12
        assert max(found) < 1e-10
        keep_cache(trainer)
    words = {tuple(each) for each in loss.handler.cache.data["facts"].tolist()}
    assert len(words) == 2
    loss.rows.prompt = "w9 "
    with pytest.raises(negcache.OptionError, match="the loss has prompt='w9 ' for items, but"):
        trainer.train()


def test_two_processes(tmp_path):
    run_program(Path(__file__).with_name("two_processes_index.py"), tmp_path, ranks=2)
