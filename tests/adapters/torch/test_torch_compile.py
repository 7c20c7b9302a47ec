"""PyTorch under torch.compile: one graph without a break, and the same numbers as eager code."""

import copy

import negcache_torch as negcache
import pytest
import torch

# Inductor imports what PyTorch itself has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

VOCABULARY, WIDTH, CAPACITY = 50, 4, 270


def model(seed, dtype=torch.float32, **options):
    """Return a handler with tiles of one block, and the tower it trains."""
    torch.manual_seed(seed)
    handler = negcache.CacheLossHandler(
        negcache.CacheManager(
            {
                "id": negcache.FieldSpec((), torch.int64),
                "embedding": negcache.FieldSpec((WIDTH,), dtype),
            },
            CAPACITY,
        ),
        negcache.CacheClassificationLoss(
            "embedding", ("id",), generator=seed, tile_bytes=1, **options
        ),
        embedding_key="embedding",
        data_keys=("id",),
    )
    return handler, torch.nn.Embedding(VOCABULARY, WIDTH)


def step(handler, tower, queries, ids):
    return handler.update_cache_and_compute_loss(
        lambda features: tower(features["id"]), queries, tower(ids), {"id": ids}
    )


def step_in_half(handler, tower, queries, ids):
    """A step and what goes with it: towers in autocast, and the oldest rows embedded anew."""
    with torch.autocast("cpu", torch.bfloat16):
        loss = step(handler, tower, queries @ tower.weight[:WIDTH], ids)
    handler.refresh(lambda features: tower(features["id"]), 5)
    return loss


class LearnedTemperature(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.log_temperature = torch.nn.Parameter(torch.tensor(0.3))

    def forward(self, scores):
        return scores * torch.exp(self.log_temperature)


HALF = {
    "dtype": torch.bfloat16,
    "estimator": "exact_query",
    "scale": torch.nn.Parameter(torch.tensor(1.5)),
    "in_batch_negatives": True,
    "id_key": "id",
    "margin": 0.5,
    "staleness_correction": True,
}


# "eager" has the graph, and its breaks; "aot_eager" also the graph of the gradients.
@pytest.mark.parametrize(
    ("backend", "step", "options"),
    [
        ("inductor", step, {"scale": 1.5}),
        ("aot_eager", step_in_half, HALF),
        ("aot_eager", step_in_half, {**HALF, "dtype": torch.int8, "margin": None}),
        (
            "aot_eager",
            step,
            {"top_k": 7, "score_transform": LearnedTemperature(), "num_samples": 3},
        ),
        ("eager", step, {"estimator": "shared", "group_key": "id", "in_batch_negatives": True}),
        (
            "inductor",
            step,
            {"estimator": "exact_query", "scale": 1.5, "max_staleness": 0.2},
        ),
        ("eager", step, {"top_k": 2}),  # groups wider than a tile: a fold in a fold
        (
            "aot_eager",
            step,
            {
                "estimator": "exact_query",
                "scale": 1.5,
                "matryoshka_dims": (1, WIDTH),
                "in_batch_negatives": True,
                "id_key": "id",
                "margin": 0.5,
            },
        ),
    ],
    ids=[
        *("inductor", "half", "int8", "top_k", "group", "window", "wide groups"),
        "matryoshka",
    ],
)
def test_one_graph_serves_every_batch_size_and_agrees_with_eager(backend, step, options):
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    eager, tower = model(0, **options)
    compiled, other_tower = copy.deepcopy((eager, tower))
    run = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    generator = torch.Generator().manual_seed(1)
    for rows in (6, 40, 40, 40, 17, 40, 40, 40, 23):
        queries = torch.randn(rows, WIDTH, generator=generator)
        ids = torch.randint(VOCABULARY, (rows,), generator=generator)
        losses, gradients = [], []
        for function, handler, table in ((step, eager, tower), (run, compiled, other_tower)):
            leaf = queries.clone().requires_grad_()
            loss = function(handler, table, leaf, ids)
            parameters = [leaf, *table.parameters(), *handler.parameters()]
            gradients.append(torch.autograd.grad(loss, parameters))
            losses.append(loss.detach())
        torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    for ours, theirs in zip(
        eager.state_dict().values(), compiled.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert bool((eager.cache.age < CAPACITY).all())  # filled: every tile had its part
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
