"""The options of the sentence-transformers loss all at once: nothing is stale, nothing is lost."""

from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from negcache_sentence_transformers import NegativeCacheLoss
from programs import torchrun
from st_trainings import told
from test_st_rows import PROMPTS, routed, transformer
from tiny_transformer import TOKENS, make_texts, make_trainer, weights

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


def test_two_processes_wait_for_each_other_in_the_same_places(tmp_path):
    torchrun(2, Path(__file__).with_name("two_processes_together.py"), tmp_path)


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
