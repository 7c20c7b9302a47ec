"""A row remembers what its embedding takes: at learning rate 0 nothing is ever stale."""

import logging
from functools import partial
from pathlib import Path

import negcache_torch as negcache
import pytest
import torch
from datasets import Dataset, DatasetDict
from negcache_sentence_transformers import NegativeCacheLoss
from negcache_sentence_transformers._calls import Calls, embed
from negcache_sentence_transformers._contents import NO_TEXT
from ranks import run_program
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router, Transformer
from sentence_transformers.sentence_transformer.modules import (
    LSTM,
    BoW,
    Pooling,
    StaticEmbedding,
    WordEmbeddings,
)
from sentence_transformers.sentence_transformer.modules.tokenizer import WhitespaceTokenizer
from tiny_transformer import TOKENS, WORDS, make_model, make_texts, make_tokenizer, make_trainer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    DataCollatorWithFlattening,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)

PROMPTS = (None, "w1 w2 w3 ", "w9 ")


def make_roberta(folder):
    """A model that numbers positions by its padding token, which is 1 and no 0."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    tokenizer = Tokenizer(
        models.WordLevel({word: row for row, word in enumerate(special + WORDS)}, "<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=len(special + WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    RobertaModel(config).save_pretrained(folder)


class Packing(Transformer):
    """Packs texts as sentence-transformers does for flash attention, which no CPU has."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.can_flatten_inputs = True
        self.data_collator = DataCollatorWithFlattening(
            return_seq_idx=True, return_flash_attn_kwargs=True, return_position_ids=True
        )
        self._flatten_position_offset = self._infer_flatten_position_offset()

    def forward(self, features, **options):
        sizes = features["cu_seq_lens_q"].diff().tolist()
        assert features["max_length_q"] == max(sizes)
        assert features["cu_seq_lens_k"].dtype == features["seq_idx"].dtype == torch.int32
        assert features["seq_idx"][0].bincount().tolist() == sizes
        inputs = {
            key: nn.utils.rnn.pad_sequence(features[key][0].split(sizes), batch_first=True)
            for key in ("input_ids", "position_ids")
        }
        mask = torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]
        tokens = self.model(**inputs, attention_mask=mask.long()).last_hidden_state
        features["token_embeddings"] = tokens[mask][None]
        return features


def transformer(
    folder, *, packed=False, roberta=False, left=False, types=False, pooling="mean", prompt=True
):
    make_roberta(folder) if roberta else make_model(folder)
    first = (Packing if packed else Transformer)(str(folder), max_seq_length=TOKENS)
    if types:
        first.tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
        first.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS]:0 $A:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    if left:
        first.tokenizer.padding_side = "left"
    modules = [first, Pooling(16, pooling, include_prompt=prompt)]
    return SentenceTransformer(modules=modules, device="cpu")


def static(size=16):
    torch.manual_seed(1)
    return StaticEmbedding(make_tokenizer(), embedding_dim=size)


def routed(folder, *, query=None, default=None, **options):
    """A small table for queries, a transformer with other numbers for other tokens beside it."""
    document = list(transformer(folder, roberta=True, **options))
    routes = {"query": query or [static()], "document": document}
    router = Router(routes, default_route=default, allow_empty_key=default is not None)
    return SentenceTransformer(modules=[router], device="cpu")


def words(folder):
    torch.manual_seed(1)
    tokenizer = WhitespaceTokenizer(WORDS)
    first = WordEmbeddings(tokenizer, torch.randn(len(WORDS), 8), max_seq_length=TOKENS)
    modules = [first, LSTM(8, 8, dropout=0.0), Pooling(16)]
    return SentenceTransformer(modules=modules, device="cpu")


def own(model, cache_size=16, **options):
    return NegativeCacheLoss(model, cache_size, own_loop=True, generator=0, **options)


def batches(model, count=8, size=3, *, prompts=PROMPTS, tasks=(None,)):
    """Batches of new texts: prompts and tasks change from one to the next, and in a batch."""
    texts = make_texts(3 * count * size)
    for step in range(count):
        columns = []
        for column in range(3):
            task = tasks[(step + column) % len(tasks)]
            columns.append(
                model.preprocess(
                    texts[(3 * step + column) * size :][:size],
                    prompt=prompts[(step + column) % len(prompts)],
                    **({} if task is None else {"task": task}),
                )
            )
        yield columns


def stays_fresh(loss, steps):
    """Train at rate 0; say how stale the drawn rows ever were."""
    found = []
    for batch in steps:
        value = loss(batch)
        value.backward()
        assert torch.isfinite(value)
        found.append(loss.metrics["staleness"].item())
    assert loss.metrics["fill"] == 1.0
    return max(found)


KINDS = {
    "prompts taken in": {},
    "prompts left out": {"prompt": False},
    "prompts left out, first token": {"prompt": False, "pooling": "cls"},
    "token types": {"types": True},
    "padded on the left": {"left": True},
    "padded on the left, last token, prompts left out": {
        "left": True,
        "pooling": "lasttoken",
        "prompt": False,
    },
    "another padding token": {"roberta": True, "prompt": False},
    "another padding token, on the left": {"roberta": True, "left": True},
    "packed": {"packed": True},
    "packed, positions from 2, prompts left out": {
        "packed": True,
        "roberta": True,
        "prompt": False,
        "pooling": "weightedmean",
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_drawn_is_embedded_as_it_was(tmp_path, kind):
    model = transformer(tmp_path, **KINDS[kind])
    assert stays_fresh(own(model), batches(model)) < 1e-10


@pytest.mark.parametrize("estimator", ["paper", "shared", "exact_query"])
@pytest.mark.parametrize("tasks", [("query", "document"), ("document",)])
def test_models_with_routes_are_embedded_each_by_its_own(tmp_path, estimator, tasks):
    model = routed(tmp_path, prompt=False)
    loss = own(model, estimator=estimator, num_samples=2, max_length=TOKENS)
    assert stays_fresh(loss, batches(model, tasks=tasks)) < 1e-10


def test_routes_may_give_other_fields(tmp_path):
    query = list(transformer(tmp_path / "query", types=True))
    model = routed(tmp_path, query=query, prompt=False)
    loss = own(model)
    rows = loss.rows.pack(
        column for batch in batches(model, 2, tasks=("query", "document")) for column in batch
    )
    assert "token_type_ids" in loss.rows.dtypes
    calls = []
    Calls(loss.rows).embed(
        lambda features: calls.append(features) or embed(loss.model, features), rows
    )
    assert {each["task"]: "token_type_ids" in each for each in calls} == {
        "query": True,
        "document": False,
    }
    assert stays_fresh(loss, batches(model, tasks=("query", "document"))) < 1e-10


def test_static_and_recurrent_models_stay_fresh(tmp_path):
    for model in (SentenceTransformer(modules=[static()], device="cpu"), words(tmp_path)):
        loss = own(model, max_length=TOKENS)
        assert stays_fresh(loss, batches(model)) < 1e-10


@pytest.mark.parametrize("kind", KINDS)
def test_rows_come_back_in_order_and_as_the_model_made_them(tmp_path, kind):
    model = transformer(tmp_path, **KINDS[kind])
    loss = own(model)
    columns = [column for batch in batches(model, 2) for column in batch]
    expected = torch.cat([embed(loss.model, column) for column in columns])
    calls = []

    def noted(features):
        calls.append(features)
        return embed(loss.model, features)

    rows = loss.rows.pack(columns)
    torch.testing.assert_close(Calls(loss.rows).embed(noted, rows), expected)
    if isinstance(model[0], Packing) or not model[1].include_prompt:
        assert len(calls) == len(PROMPTS)  # of a class of the user's nothing is known
    else:
        assert len(calls) == 1
    order = torch.randperm(len(expected))
    mixed = {key: value[order] for key, value in rows.items()}
    torch.testing.assert_close(Calls(loss.rows).embed(noted, mixed), expected[order])
    alone = {key: value[3:6] for key, value in rows.items()}
    calls.clear()
    Calls(loss.rows).embed(noted, alone)
    (found,), given = calls, dict(columns[1])
    assert found.keys() | {"prompt_length"} == given.keys() | {"prompt_length"}
    for key, value in given.items():
        if isinstance(value, torch.Tensor):
            assert found[key].dtype == value.dtype, key
            assert torch.equal(found[key], value), key
        elif key != "prompt_length":
            assert found[key] == value, key


def test_a_prompt_left_out_later_counts_too(tmp_path):
    model = transformer(tmp_path)
    loss = own(model)
    model.set_pooling_include_prompt(include_prompt=False)
    assert stays_fresh(loss, batches(model)) < 1e-10


def test_prompt_lengths_may_be_tensors_one_for_all_or_one_for_each_text(tmp_path):
    model = transformer(tmp_path, prompt=False)
    loss = own(model)
    one, other = [model.preprocess(["w5 w6 w7"], prompt=prompt) for prompt in ("w1 ", "w1 w5 ")]
    other = model.preprocess(["w6 w7"], prompt="w1 w5 ")  # the same tokens
    assert torch.equal(one["input_ids"], other["input_ids"])
    expected = torch.cat([embed(loss.model, one), embed(loss.model, other)])
    both = {key: torch.cat([one[key]] * 2) for key in loss.rows.dtypes}
    both |= {"modality": "text", "prompt_length": torch.tensor([2, 3])}
    rows = loss.rows.pack([both])
    torch.testing.assert_close(Calls(loss.rows).embed(partial(embed, loss.model), rows), expected)
    assert rows["id"].tolist() == loss.rows.pack([one, other])["id"].tolist()
    assert len(set(rows["id"].tolist())) == 2
    for length in (torch.tensor(2), torch.tensor([2])):
        again = loss.rows.pack([{**one, "prompt_length": length}])
        torch.testing.assert_close(again, loss.rows.pack([one]), rtol=0, atol=0)
    for length in (torch.tensor([1, 2, 3]), torch.tensor(0.5)):
        with pytest.raises(negcache.KindError, match=r"'prompt_length' is torch\..*each of the 2"):
            loss.rows.pack([{**both, "prompt_length": length}])


def test_the_same_numbers_on_another_route_are_another_item(tmp_path):
    router = Router({"query": [static()], "document": [static()]}, default_route="query")
    model = SentenceTransformer(modules=[router], device="cpu")
    loss = own(model, max_length=TOKENS)
    one, two, plain = [
        loss.rows.pack([model.preprocess(["w1 w2"], task=task)])["id"].item()
        for task in ("query", "document", None)
    ]
    assert len({one, two, plain}) == 3


def test_an_empty_text_is_known_as_one(tmp_path):
    texts = ["w1", "", "   ", "w1 w2"]
    empty = [False, True, True, False]
    for options in ({}, {"left": True}, {"packed": True}, {"roberta": True}):
        model = transformer(tmp_path / str(options), **options)
        loss = own(model)
        for prompt in PROMPTS:
            rows = loss.rows.pack([model.preprocess(texts, prompt=prompt)])
            assert (rows["text"] == NO_TEXT).tolist() == empty, (options, prompt)
    model = routed(tmp_path)
    loss = own(model, max_length=TOKENS)
    for task in ("query", "document"):
        rows = loss.rows.pack([model.preprocess(texts, task=task)])
        assert (rows["text"] == NO_TEXT).tolist() == empty


def test_a_loss_is_made_whether_or_not_a_text_without_a_task_has_a_route(tmp_path, monkeypatch):
    model = routed(tmp_path)
    with pytest.raises(ValueError, match="router_mapping"):
        model.preprocess(["text"])
    loss = own(model, max_length=TOKENS)
    assert "attention_mask" in loss.rows.dtypes

    def fail(self, inputs, prompt=None, **options):
        if not prompt:
            message = "a prompt is needed"
            raise RuntimeError(message)
        return plain(self, inputs, prompt=prompt, **options)

    plain = SentenceTransformer.preprocess
    monkeypatch.setattr(SentenceTransformer, "preprocess", fail)
    model = transformer(tmp_path / "prompted", prompt=False)
    loss = own(model)
    assert stays_fresh(loss, batches(model, prompts=PROMPTS[1:])) < 1e-10


def test_what_a_row_cannot_store_is_refused_and_changes_nothing(tmp_path):
    model = transformer(tmp_path)
    loss = own(model)
    anchor, positive = model.preprocess(["w1"]), model.preprocess(["w2"])
    before = {key: value.clone() for key, value in loss.state_dict().items()}
    cases = [
        ({"grid": [[1, 2]]}, negcache.KindError, "'grid', a list: besides tokens"),
        ({"task": "t" * 90}, negcache.OptionError, "give the model's tasks shorter names"),
        (
            {"weights": torch.ones_like(positive["input_ids"])},
            negcache.KeysError,
            r"a column has \['weights'\], but the cache was made for \['attention_mask', 'input",
        ),
        ({"pixel_values": torch.zeros(2, 3)}, negcache.KindError, "as from a Transformer"),
    ]
    for extra, error, text in cases:
        with pytest.raises(error, match=text):
            loss([anchor, {**positive, **extra}])
    torch.testing.assert_close(dict(loss.state_dict()), before, rtol=0, atol=0)


def test_a_slot_is_as_long_as_given_else_as_the_model_allows(tmp_path, caplog):
    model = transformer(tmp_path)
    assert own(model).rows.length == TOKENS
    assert own(model, max_length=8).rows.length == 8
    assert own(model, max_length={"query": 6, "document": 12}).rows.length == 12
    for bad in (0, -3, 2.5, True, "16", {}, {"query": None}):
        with pytest.raises(negcache.OptionError, match="expected a positive number of tokens"):
            own(model, max_length=bad)
    free = SentenceTransformer(modules=[static()], device="cpu")
    with pytest.raises(negcache.OptionError, match=r"takes 5 bytes in every slot: 1,280 bytes"):
        own(free)
    model.max_seq_length = int(1e30)  # a tokenizer without a limit
    with pytest.raises(negcache.OptionError, match="pass max_length"):
        own(model)
    assert not caplog.records
    with pytest.raises(negcache.KindError, match=r"the model turns a text into \[\]"):
        own(SentenceTransformer(modules=[BoW(WORDS)], device="cpu"))


def test_long_slots_are_told_before_they_take_memory(tmp_path, caplog, monkeypatch):
    model = transformer(tmp_path)
    assert "token_type_ids" in own(transformer(tmp_path / "types", types=True)).rows.dtypes
    model.max_seq_length = 8_192
    with caplog.at_level(logging.WARNING, "negcache_sentence_transformers"):
        own(model, 4)
    (record,) = caplog.records
    # tokens 4, mask 1; facts 96; id, text and 4 anchors of 8; 16 numbers of 4.
    slot = 8_192 * 5 + 96 + 6 * 8 + 16 * 4
    assert record.getMessage().startswith(
        f"The model allows 8,192 tokens, so a slot takes {slot:,} bytes, 40,960 of them for tokens"
    )
    caplog.clear()
    own(model, 4, max_length=8_192)
    assert not caplog.records

    def allocate(*args, **kwargs):
        pytest.fail("memory was taken")

    monkeypatch.setattr(negcache, "CacheLossHandler", allocate)
    with pytest.raises(negcache.OptionError, match=r"65,536 slots take 2,6\d\d MB: set max_length"):
        own(model, 65_536)


# transformers 5.23 has a new name for this, and sentence-transformers 6.2 the old one.
@pytest.mark.filterwarnings("ignore:.*`gradient_checkpointing_enable`.*:FutureWarning")
@pytest.mark.parametrize("checkpointed", [False, True])
def test_datasets_with_prompts_of_their_own_in_the_trainer(tmp_path, checkpointed):
    model, texts = transformer(tmp_path / "model", prompt=False), make_texts(48)
    data = DatasetDict(
        {
            name: Dataset.from_dict(
                {"anchor": [text[:5] for text in part], "positive": part, "negative": part[::-1]}
            )
            for name, part in (("one", texts[:24]), ("two", texts[24:]))
        }
    )
    loss = NegativeCacheLoss(model, 16, generator=3)
    trainer = make_trainer(
        tmp_path,
        model,
        loss,
        data,
        max_steps=8,
        learning_rate=0.0,
        activation_checkpointing=checkpointed,
        prompts={"one": {"positive": "w1 w2 "}, "two": {"anchor": "w3 ", "negative": "w4 "}},
    )
    trainer.train()
    found = [row["cache_staleness"] for row in trainer.state.log_history if "loss" in row]
    assert len(found) == 8
    assert max(found) < 1e-10


@pytest.mark.parametrize("default", [None, "document"])
def test_a_router_in_the_trainer_and_after_a_checkpoint(tmp_path, default):
    texts = make_texts(64)
    data = DatasetDict(
        {
            name: Dataset.from_dict({"anchor": [text[:5] for text in part], "positive": part})
            for name, part in (("one", texts[:32]), ("two", texts[32:]))
        }
    )
    routes = {
        "one": {"anchor": "query", "positive": "document"},
        "two": {"anchor": "document", "positive": "query"},
    }
    for resume in (None, str(tmp_path / "checkpoint-6")):
        model = routed(tmp_path / "model", prompt=False, default=default)
        loss = NegativeCacheLoss(model, 16, generator=3, max_length=TOKENS)
        trainer = make_trainer(
            tmp_path,
            model,
            loss,
            data,
            max_steps=12,
            learning_rate=0.0,
            router_mapping=routes,
            prompts={"one": {"positive": "w1 "}},
            save_strategy="steps",
            save_steps=6,
        )
        trainer.train(resume_from_checkpoint=resume)
        found = [row["cache_staleness"] for row in trainer.state.log_history if "loss" in row]
        assert len(found) == 12
        assert max(found) < 1e-10


def test_two_processes_make_the_same_calls_of_a_wrapped_model(tmp_path):
    run_program(Path(__file__).with_name("two_processes_routes.py"), tmp_path, ranks=2)
