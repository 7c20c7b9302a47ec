"""The loss for sentence-transformers in further directions: as the ranking loss has them."""

import copy
import itertools

import negcache_torch as negcache
import numpy as np
import pytest
import torch
from laws import law_of_scores, noise_for
from negcache_sentence_transformers import NegativeCacheLoss
from negcache_sentence_transformers import loss as ranking
from negcache_sentence_transformers._contents import text_ids
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from test_st_rows import routed, transformer
from test_st_together import batch_of, make_loss
from tiny_transformer import (
    columns,
    gradients,
    ids_of,
    make_model,
    make_pairs,
    make_texts,
    make_trainer,
    weights,
    written,
)
from torch import nn

ALL = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
SYMMETRIC = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
SETS = {
    "symmetric": SYMMETRIC,
    "all": {"directions": ALL},
    "symmetric, joint": {"directions": ("query_to_doc", "doc_to_query")},
    "queries": {"directions": ("query_to_query", "query_to_doc")},
    "documents": {"directions": ("query_to_doc", "doc_to_doc")},
    "all but queries": {"directions": ("query_to_doc", "doc_to_query", "doc_to_doc")},
    "all but documents": {"directions": ALL[:3]},
}
each_set = pytest.mark.parametrize("options", SETS.values(), ids=SETS)


@pytest.fixture
def model(tmp_path):
    return make_model(tmp_path / "model")


def own(model, cache_size=64, **options):
    return NegativeCacheLoss(model, cache_size, own_loop=True, generator=0, **options)


def embed(model, texts):
    rows = model(dict(model.preprocess(list(texts))))["sentence_embedding"]
    return nn.functional.normalize(rows, dim=1)


class Noise(nn.Module):
    """Stands in for the generator: what is drawn is known."""

    def uniform(self, shape, device):
        assert shape == self.noise.shape
        return self.noise


class Oracle:
    """The loss by its definition, with lists of texts and a softmax written out.

    documents: cached text -> the last four anchors whose positive it was; anchors: the reverse
    """

    def __init__(self, model, scale, directions, partition_mode="joint", *, in_batch=True):
        self.model, self.scale, self.directions = model, scale, directions
        self.joint, self.in_batch = partition_mode == "joint", in_batch
        self.documents, self.anchors = {}, {}

    def after(self, rows):
        """Return `documents` and `anchors` once rows (anchor, positive, negatives …) are in."""
        back = [pair[::-1] for pair in pairs_of(rows)]
        texts = [text for row in rows for text in row[1:]]
        return (
            joined(self.documents, texts, back),
            joined(self.anchors, [row[0] for row in rows], pairs_of(rows)),
        )

    def remember(self, rows):
        self.documents, self.anchors = self.after(rows)

    def candidates(self, rows, place):
        """Yield direction, view, and what competes in it of the batch and of the cache."""
        anchor, positive, *negatives = rows[place]
        now, (of_document, of_anchor) = pairs_of(rows), self.after(rows)
        others = rows[:place] + rows[place + 1 :]
        mine = {anchor, *(text for theirs, text in now if theirs == anchor)}
        hard = [text for text in distinct(negatives) if text not in mine]

        def documents(texts, whose):
            out = {*mine, *negatives}
            return [text for text in texts if text not in out and anchor not in whose[text]]

        def anchors(texts, whose, out, shared):
            out = out | {other for other, text in now if text == positive}
            return [text for text in texts if text not in out and not shared & {*whose[text]}]

        in_rows = [row[column] for column in range(1, len(rows[0])) for row in others]
        in_rows = [text for text in in_rows if text] if self.in_batch else []
        asked = [row[0] for row in others if row[0]] if self.in_batch else []
        known = documents(in_rows, of_document), documents(self.documents, self.documents)
        hard = [text for text in hard if anchor not in of_document[text]]
        yield "query_to_doc", 0, hard + known[0], known[1]
        sources = (asked, of_anchor), (self.anchors, self.anchors)
        yield "query_to_query", 0, *(anchors(*source, mine, mine) for source in sources)
        out = {anchor, positive}
        batch, cached = (anchors(*source, out, {positive}) for source in sources)
        yield "doc_to_query", 1, [anchor, *batch], cached
        yield "doc_to_doc", 1, *known

    def loss(self, rows, stale=None):
        """Return the loss, with the gradient that is to be expected.

        stale: text and kind -> embedding in the cache; None where those are fresh
        """
        found = []
        for place, (anchor, positive, *_) in enumerate(rows):
            if not anchor or not positive:
                continue
            views = embed(self.model, [anchor, positive])
            own, logits, scores = self.scale * views[:1] @ views[1], {}, {}
            for direction, view, batch, cached in self.candidates(rows, place):
                if direction in self.directions:
                    items = embed(self.model, ["", *batch, *cached])[1:]
                    scores[direction] = self.scale * items @ views[view]
                    logits[direction] = scores[direction].detach().clone()
                    for row, text in enumerate(cached if stale else [], len(batch)):
                        then = stale[text, direction.rpartition("_")[2]]
                        logits[direction][row] = self.scale * then @ views[view].detach()
            found.append(self.cross_entropy(own, logits, scores))
        return torch.stack(found).mean() if found else torch.zeros(())

    def cross_entropy(self, own, logits, scores):
        parts, total = [list(logits)] if self.joint else [[name] for name in logits], 0.0
        for names in parts:
            mine = [own] if "query_to_doc" in names else []  # else it is among the candidates
            known = torch.cat([*(each.detach() for each in mine), *(logits[n] for n in names)])
            now = torch.cat([*mine, *(scores[n] for n in names)])
            surrogate = (torch.softmax(known, 0) * now).sum() - own[0]
            value = torch.logsumexp(known, 0) - own[0].detach()
            total = total + value + surrogate - surrogate.detach()
        return total / len(parts)


def pairs_of(rows):
    return [(row[0], row[1]) for row in rows if row[0] and row[1]]


def distinct(texts):
    return list(dict.fromkeys(text for text in texts if text))


def joined(rings, texts, pairs):
    """Return rings of texts and of those that are there, with the partners of pairs in front."""
    rings = {**{text: [] for text in distinct(texts)}, **rings}
    for text in {text for text, _ in pairs}:
        new = distinct(other for theirs, other in pairs if theirs == text)
        rings[text] = [*new, *(old for old in rings[text] if old not in new)]
        assert len(rings[text]) < 5, "of more, a row forgets the first"
    return rings


@each_set
@pytest.mark.parametrize("triplets", [False, True], ids=["pairs", "triplets"])
def test_the_first_step_is_that_of_the_ranking_loss(model, options, triplets):
    texts = make_texts(12)
    given = [texts[:4], texts[4:8], *([texts[8:]] if triplets else [])]
    ranking = MultipleNegativesRankingLoss(model, **options)(columns(model, *given), None)
    ours = own(model, **options)(columns(model, *given))
    torch.testing.assert_close(ours, ranking)
    for mine, theirs in zip(gradients(model, ours), gradients(model, ranking), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@each_set
@pytest.mark.parametrize("estimator", ["exact_query", "shared", "paper"])
def test_the_expected_gradient_is_that_of_the_softmax_over_the_batch_and_the_cache(
    tmp_path, options, estimator
):
    """Enumerated: every draw of every view, with its probability; embeddings in the cache lag."""
    model = make_model(tmp_path, dtype=torch.float64)
    ours = own(model, 8, scale=3.0, estimator=estimator, dtype=torch.float64, **options)
    oracle, texts = Oracle(model, 3.0, **options), make_texts(12)
    before = [(texts[0], texts[1]), (texts[2], texts[3])]
    ours(columns(model, *zip(*before, strict=True)))
    oracle.remember(before)
    torch.manual_seed(1)
    table = ours.handler.cache.data["embedding"]
    table += 0.1 * torch.randn(table.shape, dtype=torch.float64)
    rows = [(texts[4], texts[1], texts[6]), (texts[2], texts[8], texts[9])]  # known, and repeated
    if "paper" in estimator:
        rows = [row[:2] for row in rows]
    batch = columns(model, *zip(*rows, strict=True))
    slots = written(ours).nonzero()[:, 0]
    stale = stale_rows(ours, model, texts)
    exact = oracle.loss(rows, stale)
    expected = gradients(model, exact)

    saved = copy.deepcopy(ours.handler.tables.state_dict())
    ours.handler.cache_loss.generator = noise = Noise()
    laws, total = law_of_draws(ours, batch, slots), 0.0
    found = [torch.zeros_like(each) for each in expected]
    for places in itertools.product(range(len(slots)), repeat=len(laws)):
        probability = np.prod([law[place] for law, place in zip(laws, places, strict=True)])
        if probability < 1e-15:
            continue
        noise.noise = torch.as_tensor(noise_for(np.asarray(places)[:, None], laws))
        ours.handler.tables.load_state_dict(saved)
        value = ours(batch)
        torch.testing.assert_close(value, exact, rtol=1e-10, atol=1e-10)
        found = [
            mine + probability * each
            for mine, each in zip(found, gradients(model, value), strict=True)
        ]
        total += probability
    assert abs(total - 1) < 1e-10
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)


def stale_rows(loss, model, texts):
    """Return text and kind -> embedding in the cache."""
    data, found = loss.handler.cache.data, {}
    names = dict(zip(ids_of(model, texts), texts, strict=True))
    tokens = text_ids(data["input_ids"], data["attention_mask"]).tolist()
    for slot in written(loss).nonzero()[:, 0].tolist():
        anchor = data["id"][slot].item() not in names
        found[names[tokens[slot]], "query" if anchor else "doc"] = data["embedding"][slot]
    return found


def law_of_draws(loss, batch, slots):
    """Return (V B, written slots): with what probability each view draws each of them."""
    retrieve, seen = loss.handler.retrieve, []

    def noted(queries, features, **more):
        rows = loss.handler.cache.data["embedding"][slots]
        scores = loss.handler.cache_loss.scale * queries @ rows.T
        keys, group = loss.handler.cache_loss.id_keys, loss.handler.cache_loss.group_key
        if group is not None:
            other = features[group][:, None] != loss.handler.cache.data[group][slots]
            scores = scores.masked_fill(other, -torch.inf)
        labels = {key: loss.handler.cache.data[key][slots] for key in keys}
        for key, own in more["positive_ids"].items():
            out = (own[:, :, None] == labels[key][None, None, :]).any(1)
            scores = scores.masked_fill(out, -torch.inf)
        seen.append(scores.detach().numpy())
        return retrieve(queries, features, **more)

    loss.handler.retrieve = noted
    loss.eval()
    training = loss.model.training
    loss.model.eval()
    loss(batch)
    loss.model.train(training)
    loss.train()
    del loss.handler.retrieve
    return law_of_scores(seen[0])


@each_set
@pytest.mark.parametrize("in_batch", [True, False])
def test_the_loss_is_the_softmax_over_the_texts_that_may_compete(tmp_path, options, in_batch):
    """Repeated anchors, symmetric pairs, shared positives, negatives of all kinds, and pads."""
    model, pick = make_model(tmp_path, dtype=torch.float64), np.random.default_rng(5)
    more = {"max_staleness": None, "dtype": torch.float64, "in_batch_negatives": in_batch}
    ours = own(model, 64, scale=3.0, num_samples=2, **more, **options)
    texts = ["", *make_texts(9)]
    for step in range(15):
        if step % 3 == 0:  # no row has more partners by then than it remembers
            ours.handler.reset()
            oracle = Oracle(model, 3.0, in_batch=in_batch, **options)
        rows = [
            (texts[pick.integers(step % 2, 10)], *pick.choice(texts, 1 + step % 3))
            for _ in range(4)
        ]
        batch = columns(model, *zip(*rows, strict=True))
        expected = oracle.loss(rows).item()
        value = ours(batch)
        torch.testing.assert_close(value.item(), expected, rtol=1e-9, atol=1e-9)
        assert all(each.isfinite().all() for each in gradients(model, value))
        assert ours.metrics["staleness"] < 1e-10
        oracle.remember(rows)
    queries = any(name.endswith("query") for name in ours.directions)
    expected = len(oracle.documents) + (len(oracle.anchors) if queries else 0)
    assert int(written(ours).sum()) == expected


@each_set
def test_training_is_on_fresh_rows_and_resumes_bit_for_bit(tmp_path, options):
    data = make_pairs(24)

    def run(folder, resume=None, **more):
        model = make_model(tmp_path / "model")
        loss = NegativeCacheLoss(model, 32, generator=3, **options)
        save = {"save_strategy": "steps", "save_steps": 2}
        trainer = make_trainer(tmp_path / folder, model, loss, data, **save, **more)
        trainer.train(resume_from_checkpoint=resume)
        return trainer.state.log_history, weights(loss)

    told, _ = run("still", learning_rate=0.0)
    assert all(row["cache_staleness"] < 1e-10 for row in told if "cache_staleness" in row)
    assert sum("cache_staleness" in row for row in told) == 4
    _, whole = run("one")
    _, resumed = run("two", str(tmp_path / "one" / "checkpoint-2"))
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)


@each_set
def test_an_evaluation_draws_and_writes_nothing_and_has_the_same_value(model, options):
    texts = make_texts(12)
    ours, fresh = own(model, **options), own(model, **options)
    batch = columns(model, texts[:4], texts[4:8], texts[8:])
    for loss in (ours, fresh):
        loss(columns(model, texts[6:10], texts[2:6]))
    before = weights(ours.handler)
    model.eval()
    told = [ours(batch).item(), ours(batch).item()]
    with torch.no_grad():
        told.append(ours(batch).item())
    model.train()
    with torch.no_grad():
        told.append(ours(batch).item())
    torch.testing.assert_close(weights(ours.handler), before, rtol=0, atol=0)
    torch.testing.assert_close(told, [fresh(batch).item()] * 4)


@each_set
def test_mini_batches_are_the_whole_step(tmp_path, options):
    texts, found = make_texts(12), []
    for size in (None, 3):
        model = make_model(tmp_path, dtype=torch.float64)
        ours = own(model, mini_batch_size=size, dtype=torch.float64, **options)
        ours(columns(model, texts[6:10], texts[2:6]))
        seen = []
        model[0].register_forward_pre_hook(
            lambda _, given, seen=seen: seen.append(len(given[0]["input_ids"]))
        )
        value = ours(columns(model, texts[:4], texts[4:8], [*texts[8:11], ""]))
        found.append([value.detach(), *gradients(model, value)])
        assert max(seen) == size or (size is None and max(seen) > 6)
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["symmetric", "all"])
def test_rows_remember_their_side_and_prompt(tmp_path, name):
    """A text that is both an anchor and a document is two rows, each with its own prompt."""
    model, texts = make_model(tmp_path), make_texts(9)
    model[1].include_prompt = False
    ours = own(model, **SETS[name])
    for step in range(6):
        anchors, documents = ([texts[(step + i + j) % 9] for i in range(4)] for j in (0, 4))
        ours(
            [
                model.preprocess(anchors, prompt="w1: "),
                model.preprocess(documents, prompt="w2 w2: "),
            ]
        )
        assert ours.metrics["staleness"] < 1e-10
    assert int(written(ours).sum()) == 18


@each_set
@pytest.mark.parametrize("routes", [False, True])
def test_nothing_is_stale_whatever_the_options(tmp_path, options, routes):
    """Prompts, tasks, routes, empty texts, repeated anchors, chunks and data sets at once."""
    model = (routed if routes else transformer)(tmp_path, prompt=False)
    loss = make_loss(model, 25, mini_batch_size=2, group_by_dataset=True, **options)
    pick = np.random.default_rng(5)
    for step in range(16):
        loss.dataset_name = ("one", "two")[pick.integers(2)]
        value = loss(batch_of(model, pick, routes=routes))
        value.backward()
        assert torch.isfinite(value), step
        assert loss.metrics["staleness"] < 1e-10, step
    assert loss.metrics["fill"] == 1.0


@each_set
def test_data_sets_do_not_meet(model, options):
    texts = make_texts(12)
    ours, alone = (own(model, group_by_dataset=True, **options) for _ in range(2))
    pairs = columns(model, texts[:4], texts[4:8])
    for loss, name in ((ours, "one"), (ours, "other"), (alone, "one")):
        loss.dataset_name = name
        loss(pairs if loss is alone or name == "one" else columns(model, texts[2:6], texts[8:]))
    assert int(written(ours).sum()) == 2 * int(written(alone).sum())
    ours.dataset_name = "one"
    batch = columns(model, texts[6:10], texts[1:5])
    torch.testing.assert_close(ours(batch).item(), alone(batch).item())


def test_directions_that_make_no_loss_are_refused_in_words(model, monkeypatch):
    for options, error, message in (
        ({"directions": "query_to_doc"}, negcache.KindError, "expected several"),
        ({"directions": 3}, negcache.KindError, "expected several"),
        ({"directions": ()}, negcache.OptionError, "which has the positive"),
        ({"directions": ALL[1:]}, negcache.OptionError, "which has the positive"),
        ({"directions": (*ALL, "up")}, negcache.OptionError, "any others of"),
        ({"directions": (*ALL, ALL[0])}, negcache.OptionError, "each once"),
        ({"directions": ALL, "in_batch_negatives": "no"}, negcache.KindError, "expected True"),
        ({"partition_mode": "all"}, negcache.OptionError, "expected 'joint' or"),
        ({"directions": ALL, "partition_mode": "per_direction"}, negcache.OptionError, "no loss"),
        ({"directions": ALL, "staleness_correction": True}, negcache.OptionError, "leave it out"),
    ):
        with pytest.raises(error, match=message):
            own(model, **options)
    own(model, staleness_correction=True, **SYMMETRIC)
    monkeypatch.setattr(ranking, "processes", lambda: 2)
    with pytest.raises(negcache.OptionError, match="in several processes, but negatives of"):
        own(model, **SYMMETRIC)


def test_the_model_card_tells_directions(model):
    told = own(model, **SYMMETRIC).get_config_dict()
    assert {key: told[key] for key in SYMMETRIC} == SYMMETRIC
    assert told["in_batch_negatives"] is True
