"""The loss for sentence-transformers: its law, its cache, and the trainer around it."""

import copy
import importlib
import itertools
import re
import shutil
from functools import partial
from pathlib import Path

import negcache_torch as negcache
import numpy as np
import pytest
import torch
from negcache_sentence_transformers import NegativeCacheLoss, keep_cache
from negcache_sentence_transformers._calls import Calls, embed
from negcache_sentence_transformers._contents import text_ids
from ranks import run_program
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tiny_transformer import (
    BATCH,
    TOKENS,
    columns,
    gradients,
    ids_of,
    make_model,
    make_pairs,
    make_texts,
    make_tokenizer,
    make_trainer,
    weights,
    written,
)
from torch import nn


@pytest.fixture
def model(tmp_path):
    return make_model(tmp_path / "model")


def own(model, cache_size=32, **options):
    return NegativeCacheLoss(model, cache_size, own_loop=True, generator=0, **options)


class Noise(nn.Module):
    """Stands in for the generator: what is drawn is known."""

    def uniform(self, shape, device):
        assert shape == self.noise.shape
        return self.noise


@pytest.mark.parametrize("estimator", ["paper", "shared", "exact_query"])
def test_expected_gradient_is_that_of_the_full_softmax(tmp_path, estimator):
    model = make_model(tmp_path, dtype=torch.float64)
    loss = own(model, 6, scale=4.0, estimator=estimator, dtype=torch.float64)
    texts = make_texts(9)
    cached, positives, negatives, anchors = texts[:3], [texts[0], texts[3]], texts[4:6], texts[6:8]
    loss(columns(model, texts[6:9], cached))  # it moves no weight: the cache stays fresh
    before = copy.deepcopy(loss.handler.tables.state_dict())
    assert loss.handler.cache.age[:4].tolist() == [0, 0, 0, negcache.EMPTY]

    def embed(texts):
        rows = model(dict(model.preprocess(texts)))["sentence_embedding"]
        return nn.functional.normalize(rows, dim=1)

    query, positive, negative, item = map(embed, (anchors, positives, negatives, cached))
    scores = 4.0 * torch.cat([query @ positive.T, (query * negative).sum(1, keepdim=True)], 1)
    stale = 4.0 * query @ item.T
    # Each anchor's own positive, of this step or of the one before.
    mine = torch.tensor([[True, False, False], [False, True, False]])
    stale = stale.masked_fill(mine, -torch.inf)
    everything = torch.cat([scores, stale], 1)
    full = nn.functional.cross_entropy(everything, torch.arange(2))
    expected = gradients(model, full)

    law = torch.softmax(stale.detach(), 1)
    middle = law.cumsum(1) - law / 2
    batch = columns(model, anchors, positives, negatives)
    loss.handler.cache_loss.generator = Noise()
    total = [torch.zeros_like(each) for each in expected]
    for slots in itertools.product(range(3), range(3)):
        probability = law[0, slots[0]] * law[1, slots[1]]
        if not probability:
            continue
        second = torch.stack([middle[row, slot] for row, slot in enumerate(slots)])
        second = second[:, None]
        loss.handler.cache_loss.generator.noise = torch.stack([second * 0 + 0.5, second], -1)
        loss.handler.tables.load_state_dict(before)
        value = loss(batch)
        torch.testing.assert_close(value, full, rtol=1e-12, atol=1e-12)
        found = gradients(model, value)
        total = [ours + probability * each for ours, each in zip(total, found, strict=True)]
    for ours, exact in zip(total, expected, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-10)
    # The positives and the negatives are in the cache now, the one that was there in its own slot.
    assert sorted(loss.handler.cache.data["id"][written(loss)].tolist()) == sorted(
        ids_of(model, texts[:6])
    )


def test_the_first_step_is_that_of_the_ranking_loss(model):
    texts = make_texts(8)
    batch = columns(model, texts[:4], texts[4:])
    ranking = MultipleNegativesRankingLoss(model)(batch, None)
    ours = own(model)(batch)
    torch.testing.assert_close(ours, ranking)
    for mine, theirs in zip(gradients(model, ours), gradients(model, ranking), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_equal_texts_are_one_item_and_no_negatives_of_each_other(model):
    loss, texts = own(model), make_texts(4)
    same = columns(model, texts[:3], [texts[3]] * 3)
    for _ in range(3):  # neither in the batch nor from the cache
        assert loss(same).item() == 0.0
    assert loss.handler.cache.data["id"][written(loss)].tolist() == ids_of(model, texts[3:])
    # One text among others: it counts against the others, and these against it.
    assert loss(columns(model, texts[:3], [texts[3], texts[3], texts[0]])).item() > 0.1


def test_an_explicit_negative_that_equals_the_positive_does_not_count(model):
    texts = make_texts(6)
    anchors, positives, negatives = texts[:2], texts[2:4], texts[4:6]
    for training in (True, False):
        model.train(training)
        with_it = own(model)(columns(model, anchors, positives, [positives[0], negatives[1]]))
        value = own(model)(columns(model, anchors[1:], positives[1:], negatives[1:]))
        # The first anchor has the other positive alone; the second has that, and its own negative.
        vectors = torch.from_numpy(model.encode(texts, normalize_embeddings=True)).double()
        scores = 20.0 * vectors[:2] @ vectors[2:].T
        expected = [
            torch.logsumexp(scores[row, kept], 0) - scores[row, row]
            for row, kept in ((0, [0, 1]), (1, [0, 1, 3]))
        ]
        torch.testing.assert_close(with_it.double(), sum(expected) / 2, rtol=1e-4, atol=1e-5)
        alone = torch.logsumexp(scores[1, [1, 3]], 0) - scores[1, 1]
        torch.testing.assert_close(value.double(), alone, rtol=1e-4, atol=1e-5)


def test_evaluation_is_against_the_cache_and_changes_nothing(model):
    loss, texts = own(model, scale=4.0, in_batch_negatives=False), make_texts(7)
    with torch.no_grad():  # nor does this, in training mode
        assert loss(columns(model, texts[:2], texts[2:4])).item() == 0.0
    assert not written(loss).any()
    loss(columns(model, texts[:3], texts[3:6]))
    model.eval()
    before = weights(loss)
    values = [loss(columns(model, texts[:2], [texts[3], texts[6]])) for _ in range(2)]
    torch.testing.assert_close(weights(loss), before, rtol=0, atol=0)
    vectors = torch.from_numpy(model.encode(texts, normalize_embeddings=True))
    scores = 4.0 * vectors[:2] @ vectors[3:7].T
    one = nn.functional.cross_entropy(scores[:1, :3], torch.tensor([0]))  # the last is not cached
    # A positive of before, scores[1, 1], is none of the other's negatives.
    other = nn.functional.cross_entropy(scores[1:, [0, 2, 3]], torch.tensor([2]))
    torch.testing.assert_close(values, [(one + other) / 2] * 2)


def test_padding_changes_nothing(model):
    loss, texts = own(model), make_texts(9)
    model.eval()
    rows = loss.rows.pack(columns(model, texts))
    assert rows["input_ids"].shape == (9, TOKENS)
    whole = {key: rows[key].long() for key in loss.rows.dtypes}
    expected = embed(loss.model, model.preprocess(texts))
    torch.testing.assert_close(embed(loss.model, {**model.preprocess(texts), **whole}), expected)
    torch.testing.assert_close(Calls(loss.rows).embed(partial(embed, loss.model), rows), expected)
    short = {key: value[:1] for key, value in rows.items()}
    given = []
    Calls(loss.rows).embed(
        lambda features: given.append(features) or embed(loss.model, features), short
    )
    given, expected = given[0], dict(model.preprocess(texts[:1]))
    assert given.pop("modality") == expected.pop("modality") == "text"
    torch.testing.assert_close(given, expected)
    left = model.preprocess(texts)
    mask = left["attention_mask"].flip(1)
    tokens = torch.zeros_like(left["input_ids"])
    tokens[mask.bool()] = left["input_ids"][left["attention_mask"].bool()]
    assert text_ids(tokens, mask).tolist() == rows["id"].tolist()
    assert len(set(rows["id"].tolist())) == 9


def test_a_static_model_takes_texts_without_padding():
    torch.manual_seed(0)
    static = StaticEmbedding(make_tokenizer(), embedding_dim=8)
    model = SentenceTransformer(modules=[static], device="cpu")
    with pytest.raises(negcache.OptionError, match="pass max_length"):
        own(model)
    loss, texts = own(model, max_length=12), make_texts(6)
    given = []
    Calls(loss.rows).embed(
        lambda features: given.append(features) or embed(loss.model, features),
        loss.rows.pack(columns(model, texts)),
    )
    torch.testing.assert_close(given, [model.preprocess(texts)])
    batch = columns(model, texts[:3], texts[3:])
    torch.testing.assert_close(loss(batch), MultipleNegativesRankingLoss(model)(batch, None))
    assert loss(batch) > 0
    assert loss.metrics["staleness"] < 1e-12


def test_a_resumed_training_goes_on_bit_for_bit(tmp_path):
    data = make_pairs(24)

    def run(folder, resume=None, steps=4, **options):
        model = make_model(tmp_path / "model", dropout=0.1)
        loss = NegativeCacheLoss(model, 16, generator=3)
        trainer = make_trainer(
            tmp_path / folder, model, loss, data, max_steps=steps, keep=False, **options
        )
        keep_cache(trainer, **({"checkpoint": resume} if resume == tmp_path / "moved" else {}))
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        return trainer, weights(loss)

    save = {"save_strategy": "steps", "save_steps": 2}
    first, whole = run("one", **save)
    checkpoint = tmp_path / "one" / "checkpoint-2"
    second, resumed = run("two", checkpoint)  # another folder: the checkpoint says where it was
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)
    timeless = [
        [{key: each[key] for key in each if "train" not in key} for each in log]
        for log in (first.state.log_history[2:4], second.state.log_history[2:4])
    ]
    assert timeless[0] == timeless[1]
    assert {"loss", "cache_fill", "cache_staleness", "cache_effective_negatives"} < set(
        timeless[0][0]
    )
    assert timeless[0][0]["cache_staleness"] > 0

    shutil.move(checkpoint, tmp_path / "moved")
    _, resumed = run("three", tmp_path / "moved")
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)
    shutil.move(next((tmp_path / "moved").glob("negcache-*")), tmp_path / "lost")
    with pytest.raises(negcache.OptionError, match="resumes at step 2, but the cache of"):
        run("four", tmp_path / "moved")


# transformers 5.23 has a new name for this, and sentence-transformers 6.2 the old one.
@pytest.mark.filterwarnings("ignore:.*`gradient_checkpointing_enable`.*:FutureWarning")
def test_what_the_trainer_can_do(tmp_path):
    """Accumulation, evaluation, checkpointed gradients and bfloat16, beside a plain run."""
    plans = {
        "plain": {},
        "checkpointed": {"activation_checkpointing": True},
        "bfloat16": {"bf16": True},
        "accumulated": {"gradient_accumulation_steps": 2, "max_steps": 2},
    }
    data, found = make_pairs(16), {}
    for name, plan in plans.items():
        model = make_model(tmp_path / "model")
        loss = NegativeCacheLoss(model, 16, generator=3)
        evaluate = {"eval_strategy": "steps", "eval_steps": 2} if name == "plain" else {}
        trainer = make_trainer(tmp_path / name, model, loss, data, **evaluate, **plan)
        trainer.train()
        assert written(loss).all(), name  # 4 batches of 4 distinct texts
        found[name] = trainer.state.log_history, weights(model)
    torch.testing.assert_close(found["checkpointed"][1], found["plain"][1])
    logs = {name: [row["loss"] for row in log if "loss" in row] for name, (log, _) in found.items()}
    assert logs["checkpointed"] == pytest.approx(logs["plain"])
    assert logs["bfloat16"] != logs["plain"]
    assert logs["bfloat16"] == pytest.approx(logs["plain"], rel=0.05)
    assert len(logs["accumulated"]) == 2
    assert [row["eval_loss"] > 0 for row in found["plain"][0] if "eval_loss" in row] == [True] * 2


def test_a_cache_is_never_lost_in_silence(model, tmp_path, monkeypatch):
    loss, data = NegativeCacheLoss(model, 8), make_pairs(8)
    with pytest.raises(negcache.OptionError, match=r"call keep_cache\(trainer\) before"):
        make_trainer(tmp_path, model, loss, data, keep=False).train()
    assert not written(loss).any()
    trainer = make_trainer(tmp_path, model, loss, data, max_steps=1)
    trainer.train()
    assert written(loss).sum() == BATCH
    with pytest.raises(negcache.OptionError, match=r"call keep_cache\(trainer\) before"):
        make_trainer(tmp_path, model, loss, data, keep=False).train()
    with pytest.raises(negcache.KindError, match="has no NegativeCacheLoss"):
        make_trainer(tmp_path, model, MultipleNegativesRankingLoss(model), data)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(negcache.OptionError, match="which are not joined yet"):
        NegativeCacheLoss(model, 8)


def test_bad_input_is_refused_and_changes_nothing(model):
    loss, texts = own(model), make_texts(6)
    before = weights(loss)
    for scale in (0, -1.0, "20", True):
        with pytest.raises(negcache.OptionError, match="expected a positive number"):
            own(model, scale=scale)
    with pytest.raises(negcache.KeysError, match="the data has one column"):
        loss(columns(model, texts))
    with pytest.raises(negcache.ShapeError, match="a text has 12 tokens, but the cache stores 8"):
        own(model, max_length=8)(columns(model, texts[:1], ["w1 " * 10]))
    anchor, positive = columns(model, texts[:2], texts[2:4])
    with pytest.raises(negcache.KindError, match="as from a Transformer"):
        loss([anchor, {**positive, "pixel_values": torch.zeros(2, 3)}])
    torch.testing.assert_close(weights(loss), before, rtol=0, atol=0)


def test_the_model_card_and_a_dict_of_losses(model, tmp_path):
    losses = {"a": NegativeCacheLoss(model, 8), "b": NegativeCacheLoss(model, 16, scale=10)}
    trainer = make_trainer(tmp_path, model, losses["a"], make_pairs(4))
    trainer.loss = losses
    (keeper,) = [each for each in trainer.callback_handler.callbacks if hasattr(each, "losses")]
    assert keeper.losses() == losses
    assert losses["b"].get_config_dict() == {
        "cache_size": 16,
        "features": "content",
        "scale": 10.0,
        "estimator": "exact_query",
        "num_samples": 1,
        "matryoshka_dims": None,
        "matryoshka_weights": None,
        "in_batch_negatives": True,
        "max_staleness": 0.2,
        "staleness_correction": False,
        "directions": ("query_to_doc",),
        "partition_mode": "joint",
        "similarity_fct": "cos_sim",
        "mini_batch_size": None,
        "max_length": TOKENS,
        "group_by_dataset": False,
    }
    assert losses["b"].temperature == 0.1
    assert "cache_size" in model.model_card_data.train_datasets[0]["loss"]["config_code"]


def test_two_processes_share_one_cache(tmp_path):
    run_program(Path(__file__).with_name("two_processes_train.py"), tmp_path, ranks=2)
    # Saved by two processes, it goes on with one.
    data, model = make_pairs(2 * BATCH), make_model(tmp_path / "alone")
    loss = NegativeCacheLoss(model, 16, generator=9)
    trainer = make_trainer(tmp_path / "more", model, loss, data, max_steps=3)
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert trainer.state.global_step == 3
    held = loss.handler.cache.data["id"][written(loss)].tolist()
    assert sorted(held) == sorted(ids_of(model, data["positive"]))  # a step alone brings half


def test_ids_are_hashes_of_all_tokens_and_their_places():
    tokens = torch.from_numpy(np.array(list(itertools.product(range(6), repeat=4))))
    ids = text_ids(tokens, torch.ones_like(tokens))
    assert len(set(ids.tolist())) == 6**4
    assert abs((ids > 0).double().mean() - 0.5) < 0.05


ROOT = Path(__file__).parents[2]


def test_the_example_learns_to_search(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "examples")
    example = importlib.import_module("sentence_transformers_search")
    sizes = ["--max-pairs", "400", "--steps", "40", "--batch-size", "16", "--cache-size", "128"]
    example.main([*sizes, "--out", str(tmp_path)])
    out = capsys.readouterr().out
    before, after = map(float, re.search(r"queries: ([\d.]+), then ([\d.]+)\n", out).groups())
    assert 0 < before < after
    assert out.partition("parse an ISO date\n")[2].count(".py:") == 3
    assert any(tmp_path.glob("checkpoint-40/negcache-*/.metadata"))
    assert "staleness" in (tmp_path / "training.svg").read_text()
