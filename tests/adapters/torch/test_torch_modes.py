"""Training and evaluation in PyTorch: by the module's mode, and by whether gradients are taken."""

import negcache_torch as negcache
import pytest
import torch
from torch import nn

TOKENS = torch.arange(12).reshape(4, 3)


def embed(tower):
    return lambda features: tower(features["tokens"])


def made(**options):
    """Return a tower and a loss with a few rows in its cache."""
    torch.manual_seed(0)
    tower = nn.EmbeddingBag(12, 8)
    features = {"tokens": TOKENS}
    loss_fn = negcache.NegativeCacheLoss(
        16, features, tower(TOKENS), generator=1, num_samples=2, **options
    )
    step(loss_fn, tower)
    return tower, loss_fn


def step(loss_fn, tower, **options):
    items = tower(TOKENS)
    return loss_fn(embed(tower), items.flip(0), items, {"tokens": TOKENS}, **options)


def state_of(loss_fn):
    return {key: value.clone() for key, value in loss_fn.state_dict().items()}


def assert_unchanged(loss_fn, before):
    after = loss_fn.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


class Model(nn.Module):
    """A model as a trainer has it, whose loss is a part of it."""

    def __init__(self):
        super().__init__()
        self.tower, self.loss_fn = made()

    def forward(self):
        return step(self.loss_fn, self.tower)


EVALUATIONS = {
    "eval": lambda tower, loss_fn: step(loss_fn.eval(), tower),
    "no_grad": lambda tower, loss_fn: torch.no_grad()(step)(loss_fn, tower),
    "inference_mode": lambda tower, loss_fn: torch.inference_mode()(step)(loss_fn, tower),
    "training=False": lambda tower, loss_fn: step(loss_fn, tower, training=False),
}


@pytest.mark.parametrize("way", EVALUATIONS)
@pytest.mark.parametrize("estimator", ["paper", "shared", "exact_query"])
def test_an_evaluation_changes_no_state_and_has_the_loss_of_the_cache_as_it_is(way, estimator):
    tower, loss_fn = made(estimator=estimator)
    before = state_of(loss_fn)
    value = EVALUATIONS[way](tower, loss_fn)
    assert_unchanged(loss_fn, before)
    items = tower(TOKENS)
    as_it_is = loss_fn.evaluate(None, items.flip(0), items, {"tokens": TOKENS}).loss
    torch.testing.assert_close(value, as_it_is)
    torch.testing.assert_close(step(loss_fn.train(), tower), as_it_is)
    changed = loss_fn.state_dict()
    assert not all(torch.equal(before[key], changed[key]) for key in before)


def test_a_models_mode_is_that_of_its_loss():
    model = Model()
    before = state_of(model.loss_fn)
    model.eval()
    model()
    assert_unchanged(model.loss_fn, before)
    model.train()
    model()
    assert (model.loss_fn.cache.age != negcache.EMPTY).sum() == 8


def test_training_true_learns_without_gradients_and_is_refused_in_evaluation_mode():
    tower, loss_fn = made()
    with torch.no_grad():
        step(loss_fn, tower, training=True)
    assert (loss_fn.cache.age != negcache.EMPTY).sum() == 8
    before = state_of(loss_fn)
    with pytest.raises(negcache.OptionError, match=r"call \.train\(\)"):
        step(loss_fn.eval(), tower, training=True)
    with pytest.raises(negcache.KindError, match="training is 'yes'"):
        step(loss_fn.train(), tower, training="yes")
    assert_unchanged(loss_fn, before)


def test_a_warm_up_without_gradients_is_told_once_that_it_keeps_nothing(caplog):
    tower = nn.EmbeddingBag(12, 8)
    loss_fn = negcache.NegativeCacheLoss(16, {"tokens": TOKENS}, 8)
    with torch.no_grad():
        for _ in range(2):
            step(loss_fn, tower)
        (told,) = caplog.messages
        assert "the cache stays empty" in told
        other = negcache.NegativeCacheLoss(16, {"tokens": TOKENS}, 8)
        step(other, tower, training=False)
        step(other.eval(), tower)
        step(other.train(), tower, training=True)
        step(other, tower)  # an evaluation amid a training
        assert len(caplog.messages) == 1


def test_the_phases_change_nothing_in_evaluation_mode():
    tower, loss_fn = made()
    before = state_of(loss_fn)
    loss_fn.eval()
    items, features = tower(TOKENS), {"tokens": TOKENS}
    found = loss_fn.retrieve(items, features)
    result = loss_fn.compute_loss(items, items, tower(found.features["tokens"]), found)
    loss_fn.commit(result, items, features)
    assert_unchanged(loss_fn, before)


def test_phases_under_no_grad_are_those_of_a_training():
    tower, loss_fn = made()
    before = state_of(loss_fn)
    items, features = tower(TOKENS), {"tokens": TOKENS}
    with torch.no_grad():
        found = loss_fn.retrieve(items, features)
    result = loss_fn.compute_loss(items, items, tower(found.features["tokens"]), found)
    with torch.no_grad():
        loss_fn.commit(result, items, features)
    after = loss_fn.state_dict()
    assert not torch.equal(
        before["cache_loss.generator.state"], after["cache_loss.generator.state"]
    )
    assert (loss_fn.cache.age != negcache.EMPTY).sum() == 8


@pytest.mark.parametrize("retrieval_fn", [None, "gumbel"])
def test_a_loss_in_evaluation_mode_asks_no_generator(retrieval_fn):
    draws = negcache.GumbelMaxRetrievalFn() if retrieval_fn else None
    tower, loss_fn = made(estimator="paper", retrieval_fn=draws)
    loss = loss_fn.cache_loss.eval()
    before = {key: value.clone() for key, value in loss.state_dict().items()}
    items = tower(TOKENS)
    values = {
        loss(
            embed(tower), items.flip(0), items, loss_fn.cache, pos_features={"tokens": TOKENS}
        ).loss.item()
        for _ in range(3)
    }
    assert len(values) == 1
    assert all(torch.equal(before[key], value) for key, value in loss.state_dict().items())


def test_a_loss_of_ones_own_is_called_and_nothing_is_written():
    def own(doc_network, query_embeddings, pos_doc_embeddings, cache):
        value = (query_embeddings * pos_doc_embeddings).sum()
        return negcache.CacheLossReturn(value, value, None, None, None, None)

    specs = {
        "tokens": negcache.FieldSpec((3,), torch.int64),
        "e": negcache.FieldSpec((8,), "float32"),
    }
    handler = negcache.CacheLossHandler(negcache.CacheManager(specs, 8), own, "e", ("tokens",))
    items = torch.ones(4, 8, requires_grad=True)
    value = handler.eval()(None, items, items, {"tokens": TOKENS})
    assert value == 32.0
    assert (handler.cache.age == negcache.EMPTY).all()


def test_a_compiled_step_knows_its_mode():
    tower, loss_fn = made()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run():
        return step(loss_fn, tower)

    run()
    assert (loss_fn.cache.age != negcache.EMPTY).sum() == 8
    before = state_of(loss_fn)
    loss_fn.eval()
    run()
    assert_unchanged(loss_fn, before)
