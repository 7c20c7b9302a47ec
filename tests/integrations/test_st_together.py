"""The options of the sentence-transformers loss all at once: nothing is stale, nothing is lost."""

from pathlib import Path

import negcache_torch as negcache
import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from negcache_sentence_transformers import NegativeCacheLoss
from negcache_sentence_transformers._calls import embed
from ranks import run_program
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from st_trainings import told
from test_st_rows import PROMPTS, routed, static, transformer
from tiny_transformer import TOKENS, make_texts, make_tokenizer, make_trainer, weights
from torch import nn

TEXTS = make_texts(60, seed=2)
TASKS = ("query", "document")


def make_loss(model, cache_size=16, **options):
    return NegativeCacheLoss(
        model,
        cache_size,
        own_loop=True,
        generator=0,
        num_samples=2,
        max_length=TOKENS,
        max_staleness=None,
        **options,
    )


def columns_of(model, rows):
    """Columns in which anchors are queries, and positives and negatives documents."""
    columns = zip(*rows, strict=True)
    return [
        model.preprocess(list(texts), task=TASKS[place > 0], prompt=PROMPTS[place])
        for place, texts in enumerate(columns)
    ]


def batch_of(model, pick, *, routes, every=False, shift=0):
    """A batch of repeated anchors, empty texts, and any prompt, task and number of negatives.

    every: whether anchors and positives are of different tasks, so that each batch has all
    """
    count, columns = int(pick.integers(1, 6)), []
    for column in range(2 + int(pick.integers(0, 3))):
        among = TEXTS[:6] if column == 0 else TEXTS
        texts = ["" if pick.random() < 0.15 else str(pick.choice(among)) for _ in range(count)]
        task = (column + shift) % 2 if every and column < 2 else pick.integers(2)
        options = {"task": TASKS[task]} if routes else {}
        prompt = PROMPTS[pick.integers(len(PROMPTS))]
        columns.append(model.preprocess(texts, prompt=prompt, **options))
    return columns


@pytest.mark.parametrize("routes", [False, True])
@pytest.mark.parametrize("size", [None, 2])
@pytest.mark.parametrize("grouped", [False, True])
def test_nothing_is_stale_whatever_the_options(tmp_path, routes, size, grouped):
    model = (routed if routes else transformer)(tmp_path, prompt=False)
    loss = make_loss(model, mini_batch_size=size, group_by_dataset=grouped)
    pick, found = np.random.default_rng(5), []
    for step in range(25):
        loss.dataset_name = ("one", "two")[pick.integers(2)]
        columns = batch_of(model, pick, routes=routes)
        if step % 6 == 5:
            model.eval()
            with torch.no_grad():
                assert torch.isfinite(loss(columns))
            model.train()
            continue
        value = loss(columns)
        value.backward()
        assert torch.isfinite(value)
        found.append(loss.metrics["staleness"].item())
    assert loss.metrics["fill"] == 1.0
    assert max(found) < 1e-10


class Sees(StaticEmbedding):
    """Takes images of four numbers too."""

    def forward(self, features, **options):
        if "pixel_values" not in features:
            return super().forward(features, **options)
        mixed = features["pixel_values"].flatten(1)
        return {**features, "sentence_embedding": mixed @ self.embedding.weight[:4]}


def test_anchors_may_be_images_of_which_equal_ones_are_one():
    torch.manual_seed(1)
    sees = Sees(make_tokenizer(), embedding_dim=16)
    model = SentenceTransformer(modules=[sees], device="cpu")
    images = torch.randn(2, 1, 2, 2)
    anchor = {"pixel_values": images[[0, 0, 1]], "modality": "image"}
    loss = make_loss(model)
    assert len(set(loss.rows.contents(anchor).tolist())) == 2
    value = loss([anchor, model.preprocess(TEXTS[:3])])
    value.backward()
    expected = []
    for row, texts in enumerate(([0, 2], [1, 2], [2, 0, 1])):
        with torch.no_grad():
            query = embed(model, {"pixel_values": anchor["pixel_values"][row : row + 1]})
            items = embed(model, model.preprocess([TEXTS[text] for text in texts]))
        scores = 20.0 * query @ items.T
        expected.append(nn.functional.cross_entropy(scores, torch.tensor([0])))
    torch.testing.assert_close(value.detach(), torch.stack(expected).mean())
    with pytest.raises(negcache.KindError, match=r"the anchors have \['grid', 'pixel_values'\]"):
        loss([{"pixel_values": images, "grid": torch.ones(3, 2)}, model.preprocess(TEXTS[:2])])


def test_equal_numbers_of_two_tokenizers_are_other_words(tmp_path):
    model = routed(tmp_path, query=[static()])
    document = model.preprocess(TEXTS[:1], task="document")
    loss = make_loss(model)
    tokens = document["input_ids"][0, 1:-1]  # without <s> and </s>
    query = {"input_ids": tokens, "offsets": torch.tensor([0]), "task": "query"}
    assert loss.rows.contents(query) != loss.rows.contents(document)
    assert loss.rows.contents({**query, "task": "document"}) == loss.rows.contents(document)
    one = [static(), static()]
    router = Router({"query": one[:1], "document": one[1:]}, default_route="query")
    model = SentenceTransformer(modules=[router], device="cpu")
    loss = make_loss(model)
    query, document = (
        loss.rows.contents(model.preprocess(TEXTS[:3], task=task)).tolist() for task in TASKS
    )
    assert query == document


def test_two_processes_wait_for_each_other_in_the_same_places(tmp_path):
    run_program(Path(__file__).with_name("two_processes_together.py"), tmp_path, ranks=2)


def test_a_resumed_training_has_every_field_bit_for_bit(tmp_path):
    texts = [*make_texts(95), ""]
    data = DatasetDict(
        {
            name: Dataset.from_dict(
                {
                    "anchor": [text[:5] for text in part],
                    "positive": part,
                    **({"negative": part[::-1]} if name == "one" else {}),
                }
            )
            for name, part in (("one", texts[:48]), ("two", texts[48:]))
        }
    )

    def run(folder, resume=None):
        model = routed(tmp_path / "model", prompt=False)
        options = {"mini_batch_size": 3, "group_by_dataset": True, "max_length": TOKENS}
        loss = NegativeCacheLoss(model, 24, generator=3, **options)
        trainer = make_trainer(
            tmp_path / folder,
            model,
            loss,
            data,
            max_steps=12,
            router_mapping={"anchor": "query", "positive": "document", "negative": "document"},
            prompts={"one": {"positive": "w1 "}, "two": {"anchor": "w3 ", "positive": "w4 w5 "}},
            save_strategy="steps",
            save_steps=6,
        )
        trainer.train(resume_from_checkpoint=resume)
        assert loss.metrics["staleness"] > 0
        return trainer, weights(loss)

    trainer, whole = run("one")
    resumed, again = run("two", str(tmp_path / "one" / "checkpoint-6"))
    torch.testing.assert_close(again, whole, rtol=0, atol=0)
    assert told(resumed)[6:-1] == told(trainer)[6:-1]
