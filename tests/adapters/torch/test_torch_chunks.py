"""in_chunks in PyTorch: random state, autocast, compilers, wrappers, and the checks of a step.

What is computed again must be what was computed first, bit for bit: the same chunks without
checkpoints are what it is compared with.
"""

import copy

import negcache_torch as negcache
import pytest
import torch
import torch.distributed as dist
from ranks import run
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from transformers import BertConfig, BertModel

# Inductor imports what PyTorch itself has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

ROWS, WIDTH, SIZE = 20, 4, 6
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def tower(dropout=0.0, dtype=torch.float64):
    torch.manual_seed(0)
    layers = nn.Linear(WIDTH, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, WIDTH)
    return nn.Sequential(*layers).to(dtype)


def kept(network, rows):
    """Go through the same chunks, and keep all activations."""
    return torch.cat([network(part) for part in rows.split(SIZE)])


def random_rows(rows=ROWS, seed=1, dtype=torch.float64):
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def assert_same(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("half", [False, True], ids=["plain", "autocast"])
def test_dropout_and_autocast_are_the_same_when_computed_again(half):
    network = tower(dropout=0.5, dtype=torch.float32)
    x = random_rows(dtype=torch.float32).requires_grad_()
    found = []
    for embed in (lambda rows: kept(network, rows), negcache.in_chunks(network, SIZE)):
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            embedding = embed(x)
        state = torch.get_rng_state()
        gradients = torch.autograd.grad(
            embedding.float().square().sum(), [x, *network.parameters()]
        )
        assert torch.equal(torch.get_rng_state(), state)  # what comes next draws what it would have
        found.append([embedding, *gradients, state])
    assert found[0][0].dtype == (torch.bfloat16 if half else torch.float32)
    assert_same(*found)


def test_chunks_have_masks_of_their_own():
    torch.manual_seed(0)
    mask = negcache.in_chunks(nn.Dropout(0.5), SIZE)(torch.ones(3 * SIZE, 50))
    assert not torch.equal(mask[:SIZE], mask[SIZE : 2 * SIZE])


def test_a_transformer_takes_tokens_and_mask():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "max_position_embeddings": 32}
    config = BertConfig(vocab_size=50, num_hidden_layers=2, num_attention_heads=2, **sizes)
    model = BertModel(config).train()  # with its dropout
    tokens = {
        "input_ids": torch.randint(50, (ROWS, 7)),
        "attention_mask": (torch.arange(7) < torch.randint(1, 8, (ROWS, 1))).long(),
        "token_type_ids": None,
    }

    def embed(tokens):
        return model(**tokens).last_hidden_state[:, 0]

    def kept_embed(tokens):
        parts = [
            {
                key: None if part is None else part[start : start + SIZE]
                for key, part in tokens.items()
            }
            for start in range(0, ROWS, SIZE)
        ]
        return torch.cat([embed(part) for part in parts])

    found = []
    for function in (kept_embed, negcache.in_chunks(embed, SIZE)):
        torch.manual_seed(3)
        model.zero_grad()
        embedding = function(tokens)
        embedding.square().sum().backward()
        gradients = [each.grad for each in model.parameters() if each.grad is not None]
        found.append([embedding, *(each.clone() for each in gradients)])
    assert_same(*found)


def test_functional_call_inside_of_the_network():
    network, x = tower(), random_rows()
    own = {
        key: (1.5 * value.detach()).requires_grad_() for key, value in network.named_parameters()
    }
    found = []
    for size in (ROWS, SIZE):
        embed = negcache.in_chunks(lambda rows: functional_call(network, own, (rows,)), size)
        found.append(torch.autograd.grad(embed(x).square().sum(), list(own.values())))
    torch.testing.assert_close(*found, **EXACT)


class Step(nn.Module):
    """Towers and a loss; a forward pass is a step, in chunks unless `size` is None."""

    def __init__(self, size, *, generator=0, dtype=torch.float64, cache_size=64):
        super().__init__()
        self.size, self.item, self.query = size, tower(dtype=dtype), nn.Linear(WIDTH, WIDTH)
        self.query.to(dtype)
        example = torch.zeros(1, WIDTH, dtype=dtype)
        self.loss_fn = negcache.NegativeCacheLoss(
            cache_size, {"x": example}, example, generator=generator
        )

    def embedders(self):
        query, item = self.query, lambda features: self.item(features["x"])
        if self.size is None:
            return query, item
        return negcache.in_chunks(query, self.size), negcache.in_chunks(item, self.size)

    def forward(self, x):
        query, item = self.embedders()
        return self.loss_fn(item, query(x.flip(1)), item({"x": x}), {"x": x})


def gradients_of(model):
    found = [parameter.grad.clone() for parameter in model.parameters()]
    return [each.full_tensor() if isinstance(each, DTensor) else each for each in found]


def train(model, batches):
    """Return each step's loss and gradients, at fixed weights."""
    found = []
    for batch in batches:
        model.zero_grad()
        loss = model(batch)
        loss.backward()
        found.append([loss.detach(), *gradients_of(model)])
    return found


def test_a_large_step_in_chunks_is_the_plain_step_with_its_cache():
    batches = [random_rows(512, seed) for seed in range(3)]
    plain, chunked = Step(None, cache_size=1024), Step(64, cache_size=1024)
    for ours, theirs in zip(train(chunked, batches), train(plain, batches), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    ours, theirs = chunked.loss_fn.state_dict(), plain.loss_fn.state_dict()
    for key, value in theirs.items():
        if "embedding" in key:
            torch.testing.assert_close(ours[key], value, rtol=1e-12, atol=1e-12)
        else:
            assert torch.equal(ours[key], value), key
    assert int(chunked.loss_fn.cache.age.max()) < negcache.EMPTY


def test_a_forgotten_no_grad_is_seen_through_chunks():
    model = Step(SIZE)
    model(random_rows(seed=0))
    query, item = model.embedders()
    x = random_rows()
    still = negcache.in_chunks(torch.no_grad()(lambda given: model.item(given["x"])), SIZE)
    for network, positives in ((item, item({"x": x}).detach()), (still, item({"x": x}))):
        with pytest.raises(negcache.OptionError, match="carry no gradient"):
            model.loss_fn(network, query(x), positives, {"x": x})


def test_a_whole_step_in_chunks_of_it_is_refused():
    model = Step(None)
    loss = negcache.in_chunks(lambda x: model(x) * x, SIZE)(random_rows().requires_grad_())
    with pytest.raises(negcache.OptionError, match="Checkpoint the towers inside the step"):
        loss.sum().backward()


@pytest.mark.parametrize(
    ("what", "backend"), [("step", "aot_eager"), ("network", "aot_eager"), ("network", "inductor")]
)
def test_compiled_steps_and_networks_agree_with_eager_ones(what, backend):
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    eager = Step(SIZE)
    compiled = copy.deepcopy(eager)
    call = compiled
    if what == "step":
        call = torch.compile(compiled, fullgraph=True, backend=backend)
    else:
        compiled.item = torch.compile(compiled.item, fullgraph=True, backend=backend)
    for rows in (20, 20, 13):
        x = random_rows(rows, rows)
        found = []
        for model, function in ((eager, eager), (compiled, call)):
            model.zero_grad()
            loss = function(x)
            loss.backward()
            found.append([loss, *gradients_of(model)])
        torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)
    assert not counters["graph_break"]
    # Of a step one for each batch size, as the chunks are written out; of a network that for whole
    # chunks, and one for the rest.
    assert counters["stats"]["unique_graphs"] <= 3


RANKS = 2
WRAPPERS = {"ddp": {}, "ddp static": {"static_graph": True}}


def train_ranks(rank):
    """Gradients in chunks, around the step or around a tower, are the mean of the ranks'."""
    batches = [random_rows(13, 100 * rank + step) for step in range(3)]
    expected = train(Step(None, generator=rank), batches)
    for found in expected:
        for each in found[1:]:
            dist.all_reduce(each)
            each.div_(RANKS)
    for options in WRAPPERS.values():
        model = Step(SIZE, generator=rank)
        wrapped = DistributedDataParallel(model, **options)
        _same(_train_wrapped(wrapped, model, batches), expected)
        model = Step(SIZE, generator=rank)
        bare = model.item, model.query
        model.item, model.query = (DistributedDataParallel(each, **options) for each in bare)
        _same(_train_wrapped(model, model, batches), expected)
    model = Step(SIZE, generator=rank)
    for each in (model.item, model.query, model):
        fully_shard(each)
    _same(train(model, batches), expected)


def _train_wrapped(wrapped, model, batches):
    found = []
    for batch in batches:
        model.zero_grad()
        loss = wrapped(batch)
        loss.backward()
        found.append([loss.detach(), *gradients_of(model)])
    return found


def _same(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_wrappers_of_ranks_around_the_step_or_around_a_tower(tmp_path):
    run(tmp_path, train_ranks, ranks=RANKS)
