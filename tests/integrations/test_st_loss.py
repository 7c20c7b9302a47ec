"""The loss for sentence-transformers: which texts compete, wrappers, mini-batches, and trainers."""

import math
from pathlib import Path

import negcache_torch as negcache
import numpy as np
import pytest
import torch
from negcache_sentence_transformers import NegativeCacheLoss, _calls
from negcache_sentence_transformers._contents import text_ids
from negcache_sentence_transformers._known import NOTHING, RING
from peft import LoraConfig
from ranks import run_program
from sentence_transformers import SentenceTransformer, SparseEncoder
from sentence_transformers.sentence_transformer.losses import (
    AdaptiveLayerLoss,
    Matryoshka2dLoss,
    MatryoshkaLoss,
)
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from sentence_transformers.sparse_encoder.modules import SpladePooling
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_transformer import (
    BATCH,
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


@pytest.fixture
def model(tmp_path):
    return make_model(tmp_path / "model")


def own(model, cache_size=32, **options):
    return NegativeCacheLoss(model, cache_size, own_loop=True, generator=0, **options)


class Oracle:
    """The loss by its definition: sets of texts, and a softmax written out.

    rings: text in the cache -> the anchors whose positive it was, the newest first
    """

    def __init__(self, model, scale, *, in_batch):
        self.model, self.scale, self.in_batch, self.rings = model, scale, in_batch, {}

    def competing(self, rows):
        """Return of each row (anchor, positive, negatives …) the texts that compete, or None.

        Those of the batch, and those of the cache.
        """
        pairs = [(anchor, positive) for anchor, positive, *_ in rows if anchor and positive]
        found, rings = [], self.joined(pairs)
        for place, (anchor, positive, *negatives) in enumerate(rows):
            if not anchor or not positive:
                found.append(None)
                continue
            mine = {anchor, "", *(other for theirs, other in pairs if theirs == anchor)}
            batch = [
                other
                for row, (_, other, *_) in enumerate(rows)
                if self.in_batch and row != place and other not in {*mine, *negatives}
            ]
            hard = [
                text
                for column, text in enumerate(negatives)
                if text not in {*mine, *negatives[:column]}
            ]
            cached = [text for text in self.rings if text not in {*mine, *negatives}]
            found.append(
                (
                    [text for text in batch + hard if anchor not in rings.get(text, [])],
                    [text for text in cached if anchor not in self.rings[text]],
                )
            )
        return found

    def joined(self, pairs):
        rings = dict(self.rings)
        for text in {positive for _, positive in pairs}:
            new = list({anchor for anchor, positive in pairs if positive == text})
            rings[text] = [*new, *(old for old in rings.get(text, []) if old not in new)][:4]
        return rings

    def loss(self, rows):
        values = []
        for row, texts in zip(rows, self.competing(rows), strict=True):
            if texts is not None:
                scores = self.scores(row[0], [row[1], *texts[0], *texts[1]])
                values.append(math.log(np.exp(scores - scores[0]).sum()))
        return sum(values) / max(len(values), 1)

    def scores(self, anchor, texts):
        with torch.no_grad():
            rows = self.model(dict(self.model.preprocess([anchor, *texts])))["sentence_embedding"]
        query, *items = torch.nn.functional.normalize(rows.double(), dim=1).numpy()
        return self.scale * np.stack(items) @ query

    def remember(self, rows):
        self.rings = self.joined([row[:2] for row in rows if row[0] and row[1]])
        for row in rows:
            for text in row[1:]:
                if text:
                    self.rings.setdefault(text, [])


@pytest.mark.parametrize("in_batch", [True, False])
@pytest.mark.parametrize("estimator", ["paper", "exact_query"])
def test_the_loss_is_the_softmax_over_the_texts_that_may_compete(tmp_path, estimator, in_batch):
    """Repeated anchors, symmetric pairs, negatives that are positives or there twice, and pads."""
    model, pick = make_model(tmp_path, dtype=torch.float64), np.random.default_rng(5)
    options = {"in_batch_negatives": in_batch, "max_staleness": None, "dtype": torch.float64}
    ours = own(model, 16, scale=4.0, estimator=estimator, num_samples=3, **options)
    oracle, texts = Oracle(model, 4.0, in_batch=in_batch), ["", *make_texts(9)]
    names = dict(zip(ids_of(model, texts), texts, strict=True))
    retrieve, drawn = ours.handler.retrieve, []

    def noted(*given, **more):
        drawn.append(retrieve(*given, **more))
        return drawn[-1]

    ours.handler.retrieve = noted
    seen = set()
    for step in range(30):
        negatives = step % 3
        rows = [
            [texts[pick.integers(step % 2, 5)], *pick.choice(texts, 1 + negatives)]
            for _ in range(BATCH)
        ]
        batch = columns(model, *zip(*rows, strict=True))
        expected = oracle.loss(rows)
        with torch.no_grad():
            torch.testing.assert_close(ours(batch).item(), expected, rtol=1e-9, atol=1e-9)
        value = ours(batch)
        torch.testing.assert_close(value.item(), expected, rtol=1e-9, atol=1e-9)
        assert all(each.isfinite().all() for each in gradients(model, value))
        found = drawn.pop()
        tokens = found.features["input_ids"], found.features["attention_mask"]
        told = [names[each] for each in text_ids(*tokens).tolist()]
        for row, texts_of_row in enumerate(oracle.competing(rows)):
            for place in range(3):
                if found.drawn[row, place] and texts_of_row is not None:
                    assert told[3 * row + place] in texts_of_row[1]
                    seen.add(told[3 * row + place])
        oracle.remember(rows)
        data = ours.handler.cache.data
        there = {
            names[data["id"][slot].item()]: {
                data[key][slot].item() for key in RING if data[key][slot] != NOTHING
            }
            for slot in written(ours).nonzero()[:, 0].tolist()
        }
        assert there.keys() == oracle.rings.keys()
        contents = dict(
            zip(texts, ours.rows.contents(model.preprocess(texts)).tolist(), strict=True)
        )
        assert there == {
            text: {contents[anchor] for anchor in ring} for text, ring in oracle.rings.items()
        }
    assert "" not in there
    assert len(seen) > 5


def test_a_row_knows_the_last_four_anchors_of_which_it_was_a_positive(model):
    texts, ours = make_texts(8), own(model, max_staleness=None)
    contents = ours.rows.contents(model.preprocess(texts)).tolist()
    for count in range(1, 7):
        ours(columns(model, [texts[count]], [texts[0]]))
        slot = written(ours).nonzero().item()
        ring = [ours.handler.cache.data[key][slot].item() for key in RING]
        newest_first = contents[count:0:-1][:4]
        assert ring == newest_first + [NOTHING] * (4 - len(newest_first))
    ours(columns(model, [texts[7]], [texts[0]]))
    model.eval()
    for anchor in range(1, 8):  # the fourth to the seventh anchor; the others are forgotten
        value = ours(columns(model, [texts[anchor]], [make_texts(9)[8]])).item()
        assert (value == 0.0) == (anchor >= 4), anchor


def test_a_batch_knows_more_than_a_row_does(model):
    """Five anchors share a positive that is one of the first anchor's two."""
    texts = make_texts(9)
    anchors = [texts[0], texts[0], *texts[1:5]]
    positives = [texts[5], texts[6], *[texts[6]] * 4]
    ours, oracle = own(model), Oracle(model, 20.0, in_batch=True)
    rows = list(zip(anchors, positives, strict=True))
    assert oracle.competing(rows)[0] == ([], [])
    value = ours(columns(model, anchors, positives)).item()
    expected = []
    for row, (anchor, positive) in enumerate(rows):
        others = [] if row < 2 else [texts[5]]
        scores = oracle.scores(anchor, [positive, *others])
        expected.append(math.log(np.exp(scores - scores[0]).sum()))
    assert value == pytest.approx(np.mean(expected), rel=1e-4)


def test_prompts_do_not_hide_that_texts_are_equal(model):
    texts, ours = make_texts(4), own(model)
    query, item = ({"prompt": prompt} for prompt in ("w1: ", "w2 w2: "))
    pairs = [texts[0], texts[1]], [texts[2], texts[3]]
    there = [model.preprocess(pairs[0], **query), model.preprocess(pairs[1], **item)]
    back = [model.preprocess(pairs[1], **query), model.preprocess(pairs[0], **item)]
    ours(there)
    symmetric = ours(back).item()
    model.eval()
    # Of the first anchor, w2's: the other item of each direction, and not itself.
    scores = [
        20.0
        * cosines(model.encode(f"w1: {anchor}"), model.encode([f"w2 w2: {text}" for text in items]))
        for anchor, items in (
            (texts[2], [texts[0], texts[1], texts[3]]),
            (texts[3], [texts[1], texts[0], texts[2]]),
        )
    ]
    expected = [math.log(np.exp(each - each[0]).sum()) for each in scores]
    assert symmetric == pytest.approx(np.mean(expected), rel=1e-4)


def cosines(query, items):
    items = items / np.linalg.norm(items, axis=1, keepdims=True)
    return items @ (query / np.linalg.norm(query))


def test_rows_without_a_text_have_no_loss_and_an_encoder_does_not_see_them(model):
    texts, ours = make_texts(6), own(model)
    seen = []
    hook = model[0].register_forward_pre_hook(
        lambda _, given: seen.append(given[0]["attention_mask"].sum(1).min().item())
    )
    ragged = columns(model, texts[:2], texts[2:4], [texts[4], ""])
    value = ours(ragged)
    hook.remove()
    assert min(seen) > 2  # [CLS] and [SEP] alone
    assert sorted(ours.handler.cache.data["id"][written(ours)].tolist()) == sorted(
        ids_of(model, texts[2:5])
    )
    oracle = Oracle(model, 20.0, in_batch=True)
    rows = [(texts[0], texts[2], texts[4]), (texts[1], texts[3], "")]
    assert value.item() == pytest.approx(oracle.loss(rows), rel=1e-4)
    for hidden in ((["", texts[1]], texts[2:4]), (texts[:2], ["", texts[3]])):
        ours = own(model)
        value = ours(columns(model, *hidden, [texts[4], texts[5]]))
        others = [texts[2]] if hidden[1][0] else []
        scores = oracle.scores(texts[1], [texts[3], *others, texts[5]])
        expected = math.log(np.exp(scores - scores[0]).sum())
        assert value.item() == pytest.approx(expected, rel=1e-4), hidden
        assert all(each.isfinite().all() for each in gradients(model, value))
        assert ours.metrics["empty"] == 1
    nothing = ours(columns(model, ["", ""], texts[:2]))
    assert nothing.item() == 0.0
    assert not any(each.any() for each in gradients(model, nothing))
    assert ours(columns(model, texts[:1], [""])).item() == 0.0


def test_a_static_model_has_texts_of_no_tokens():
    torch.manual_seed(0)
    static = StaticEmbedding(make_tokenizer(), embedding_dim=8)
    model = SentenceTransformer(modules=[static], device="cpu")
    ours, texts = own(model, max_length=12, mini_batch_size=2), make_texts(4)
    value = ours(columns(model, texts[:2], texts[2:4], ["", texts[1]]))
    assert value > 0
    assert value.item() == own(model, max_length=12)(columns(model, texts[:2], texts[2:4])).item()
    assert written(ours).sum() == 3  # the second's negative too


@pytest.mark.parametrize("wrap", ["matryoshka", "2d", "layers"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_wrapping_loss_is_refused_before_anything_changes(model, wrap, compiled):
    ours, texts = own(model), make_texts(8)
    wrapped = {
        "matryoshka": lambda: MatryoshkaLoss(model, ours, [16, 8]),
        "2d": lambda: Matryoshka2dLoss(model, ours, [16, 8]),
        "layers": lambda: AdaptiveLayerLoss(model, ours),
    }[wrap]()
    if compiled:
        whole = torch.compile(model, backend="eager")
        for each in (ours, wrapped, wrapped.loss):  # as the trainer does it
            each.model = whole
    before, seen = weights(ours), []
    model[0].register_forward_hook(lambda *_: seen.append(1))
    with pytest.raises(negcache.OptionError, match=r"NegativeCacheLoss\(matryoshka_dims=…\)"):
        wrapped(columns(model, texts[:4], texts[4:]), None)
    torch.testing.assert_close(weights(ours), before, rtol=0, atol=0)
    assert not seen
    assert ours.metrics == {}
    assert ours(columns(model, texts[:4], texts[4:])) > 0  # and alone it works again


def test_a_model_of_another_kind_is_refused(tmp_path):
    model = make_model(tmp_path)
    sparse = SparseEncoder(modules=[model[0], SpladePooling()], device="cpu")
    with pytest.raises(negcache.KindError, match="is a SparseEncoder: expected a SentenceTr"):
        own(sparse)


def plain_chunks(network, size):
    """Take rows `size` at a time, and remember all of it."""

    def chunked(rows):
        count = len(rows["input_ids"])
        return torch.cat(
            [
                network({key: value[start : start + size] for key, value in rows.items()})
                for start in range(0, count, size)
            ]
        )

    return chunked


@pytest.mark.parametrize("amp", [False, True])
def test_mini_batches_have_the_loss_and_the_gradient_of_the_whole(tmp_path, monkeypatch, amp):
    texts = make_texts(30)
    batch = texts[:10], texts[10:20], [*texts[20:29], ""]

    def run(size, dropout, training=True):
        model = make_model(tmp_path, dropout=dropout, dtype=torch.float32 if amp else torch.float64)
        ours, sizes, stored = own(model, 64, mini_batch_size=size), [], []
        model.train(training)
        model[0].register_forward_pre_hook(
            lambda _, given: sizes.append(len(given[0]["input_ids"]))
        )
        torch.manual_seed(3)

        def note(tensor):
            stored.append(tensor.numel())
            return tensor

        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            ours(columns(model, *batch))
            sizes.clear()
            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                value = ours(columns(model, *batch))
        found = [*gradients(model, value), value.detach()] if training else [value.detach()]
        return found, max(sizes), sum(stored)

    whole, largest, numbers = run(None, 0.0)
    parts, chunk, few = run(3, 0.0)
    close = {"rtol": 0.1, "atol": 0.02} if amp else {"rtol": 1e-6, "atol": 1e-9}
    torch.testing.assert_close(parts, whole, **close)
    assert (largest, chunk) == (29, 3)  # positives, negatives that are texts, and drawn rows
    assert few < numbers / 5
    told, chunk, _ = run(3, 0.0, training=False)
    torch.testing.assert_close(told, run(None, 0.0, training=False)[0], **close)
    assert chunk == 3

    dropped, _, few = run(3, 0.5)
    monkeypatch.setattr(_calls, "in_chunks", plain_chunks)
    kept, _, numbers = run(3, 0.5)
    torch.testing.assert_close(dropped, kept)
    assert few < numbers / 5
    assert not torch.allclose(dropped[0], parts[0])


def test_mini_batches_are_a_whole_number(model):
    for size, error in ((0, negcache.OptionError), (2.5, negcache.KindError)):
        with pytest.raises(error, match="size is"):
            own(model, mini_batch_size=size)


LORA = {"r": 2, "lora_alpha": 4, "lora_dropout": 0.1, "target_modules": ["query", "value"]}


def test_adapters_are_trained_and_resumed_bit_for_bit(tmp_path):
    data = make_pairs(24)

    def run(folder, resume=None):
        model = make_model(tmp_path / "model", dropout=0.1)
        base = weights(model)
        torch.manual_seed(1)
        model.add_adapter(LoraConfig(**LORA))
        ours = NegativeCacheLoss(model, 16, generator=3)
        save = {"save_strategy": "steps", "save_steps": 2}
        made = make_trainer(tmp_path / folder, model, ours, data, **save)
        made.train(resume_from_checkpoint=resume)
        assert ours.metrics["staleness"] > 0
        assert written(ours).all()
        return base, weights(ours)

    base, whole = run("one")
    kept = {key.replace(".base_layer", ""): value for key, value in whole.items()}
    for key, value in base.items():
        torch.testing.assert_close(kept[f"model.{key}"], value, rtol=0, atol=0)
    assert any("lora_B" in key and value.any() for key, value in whole.items())
    _, resumed = run("two", str(tmp_path / "one" / "checkpoint-2"))
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)


def test_a_compiled_model_trains_as_the_plain_one(tmp_path):
    found = {}
    plans = {"plain": {}, "compiled": {"torch_compile": True, "torch_compile_backend": "aot_eager"}}
    for name, plan in plans.items():
        model = make_model(tmp_path / "model")
        ours = NegativeCacheLoss(model, 16, generator=3)
        make_trainer(tmp_path / name, model, ours, make_pairs(16), **plan).train()
        assert written(ours).all()
        found[name] = weights(model)
    torch.testing.assert_close(found["compiled"], found["plain"])


def test_streamed_data_and_mini_batches_log_to_tensorboard(model, tmp_path):
    stream = make_pairs(16).to_iterable_dataset(num_shards=2)
    ours = NegativeCacheLoss(model, 16, generator=3, mini_batch_size=3)
    make_trainer(tmp_path, model, ours, stream, report_to=["tensorboard"], bf16=True).train()
    assert written(ours).all()
    (log,) = {each.parent for each in Path(tmp_path).rglob("events.out.tfevents.*")}
    events = EventAccumulator(str(log)).Reload()
    names = {"loss", "cache_fill", "cache_staleness", "cache_effective_negatives", "cache_empty"}
    assert {f"train/{name}" for name in names} < set(events.Tags()["scalars"])
    assert [each.value for each in events.Scalars("train/cache_fill")] == [0.0, 0.25, 0.5, 0.75]
    card = model.model_card_data.train_datasets[0]["loss"]["config_code"]
    assert '"mini_batch_size": 3' in card
    assert '"estimator": "exact_query"' in card


def test_what_two_processes_know_is_what_one_would(tmp_path):
    run_program(Path(__file__).with_name("two_processes_know.py"), tmp_path, ranks=2)


def test_int8_rows_take_a_quarter_of_the_memory_and_only_rounding_makes_them_stale(model):
    loss, plain = own(model, dtype="int8"), own(model)
    width, texts = model.get_embedding_dimension(), make_texts(BATCH)
    assert plain.slot_bytes - loss.slot_bytes == 3 * width - 4
    for _ in range(4):
        loss(columns(model, texts, [text + " it" for text in texts]))
        assert loss.handler.metrics["staleness"] < 1e-4
    assert loss.handler.cache.data["embedding"].dtype == torch.int8
