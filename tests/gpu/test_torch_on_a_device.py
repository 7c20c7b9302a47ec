"""PyTorch on a device: the conformance kit, and what only a device can get wrong.

`make gpu` runs these. NEGCACHE_DEVICE names another device than "cuda": "cpu" tries the tests.
"""

import copy
import io
import os

import negcache_torch as negcache
import pytest
import torch
from packaging.version import Version
from torch_backend import TORCH

from negcache_core.testing import CHECKS

# Ranks and shards are processes of their own: test_two_devices.py.
WITH_REPLICAS = ("replicas", "shards")
VOCABULARY, WIDTH, SLOTS, BATCH = 500, 16, 1_024, 32


@pytest.fixture
def device():
    """What everything is made on, unless it says otherwise."""
    found = torch.device(os.environ.get("NEGCACHE_DEVICE", "cuda"))
    torch.set_default_device(found)
    yield found
    torch.set_default_device(None)


def host(tensor):
    return TORCH.to_numpy(tensor.detach().cpu())


def gradients(function, arrays, *constants):
    leaves = [array.clone().requires_grad_() for array in arrays]
    function(*leaves, *constants).backward()
    return [host(leaf.grad) for leaf in leaves]


# PyTorch 2.11 cannot index unsigned numbers of more than 8 bits on CUDA.
DTYPES = [name for name in TORCH.dtypes if name not in ("uint16", "uint32", "uint64")]
ON_DEVICE = TORCH._replace(to_numpy=host, gradients=gradients, replicas=None, dtypes=tuple(DTYPES))


@pytest.mark.parametrize("check", [name for name in CHECKS if name not in WITH_REPLICAS])
@pytest.mark.usefixtures("device")
def test_the_device_passes_the_conformance_kit(check):
    CHECKS[check](ON_DEVICE)


class Towers(torch.nn.Module):
    """Two towers with a layer each, so that products count, and a cache."""

    def __init__(self, device, **options):
        super().__init__()
        torch.manual_seed(0)
        self.queries = torch.nn.Embedding(VOCABULARY, WIDTH, device="cpu")
        self.items = torch.nn.Sequential(
            torch.nn.Embedding(VOCABULARY, WIDTH, device="cpu"),
            torch.nn.Linear(WIDTH, WIDTH, device="cpu"),
        )
        with torch.device("cpu"):
            self.loss_fn = negcache.NegativeCacheLoss(
                SLOTS,
                {"item": negcache.FieldSpec((), torch.int64)},
                embedding=WIDTH,
                scale=5.0,
                labels={"id": negcache.FieldSpec((), torch.int64)},
                id_keys=("id",),
                generator=0,
                **options,
            )
        self.to(device)

    def embed_items(self, features):
        return torch.nn.functional.normalize(self.items(features["item"]), dim=1)

    def forward(self, ids):
        queries = torch.nn.functional.normalize(self.queries(ids), dim=1)
        features = {"item": ids}
        return self.loss_fn(
            self.embed_items, queries, self.embed_items(features), features, labels={"id": ids}
        )


def batches(count, device):
    generator = torch.Generator().manual_seed(1)
    with torch.device("cpu"):
        ids = torch.randint(0, VOCABULARY, (count, BATCH), generator=generator)
    return ids.to(device)


def train(model, ids, rate=0.1, step=None):
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    losses = []
    for some in ids:
        optimizer.zero_grad()
        loss = (model if step is None else step)(some)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


OPTIONS = [
    {},
    {"estimator": "shared", "num_samples": 2},
    {"estimator": "paper", "in_batch_negatives": False},
    {"staleness_correction": True},
    {"margin": 0.5},
    {"max_staleness": None, "top_k": 64, "estimator": "shared"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_training_is_that_of_the_host(device, options):
    """The generator draws the same numbers everywhere, so the same rows are drawn."""
    here = train(Towers(device, **options), batches(20, device))
    there = train(Towers("cpu", **options), batches(20, "cpu"))
    torch.testing.assert_close(here.cpu(), there, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_no_row_is_stale_while_nothing_is_learned(device, dtype):
    model, ids = Towers(device), batches(30, device)
    # The same row in another batch may be rounded otherwise in a half type.
    most = 1e-10 if dtype is None else 1e-4
    for some in ids:
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            model(some).backward()
        assert model.loss_fn.metrics["staleness"] < most


def test_a_resumed_training_goes_on_bit_for_bit(device):
    model, ids = Towers(device), batches(20, device)
    train(model, ids[:10])
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    resumed = Towers("cpu")
    resumed.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    resumed.to(device)
    file.seek(0)
    again = Towers(device)
    again.load_state_dict(torch.load(file, map_location=device, weights_only=True))
    expected = train(model, ids[10:])
    assert torch.equal(train(again, ids[10:]), expected)
    assert torch.equal(train(resumed, ids[10:]), expected)


def test_a_scaled_loss_in_float16_learns_what_float32_learns(device):
    ids, start, moved = batches(60, device), Towers(device), []
    for dtype in (torch.float16, torch.float32):
        model = Towers(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
        for some in ids:
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.float16, enabled=dtype is torch.float16):
                loss = model(some)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        moved.append((model.items[0].weight - start.items[0].weight).flatten())
        assert torch.isfinite(model.loss_fn.cache.data["embedding"]).all()
    assert torch.nn.functional.cosine_similarity(*moved, dim=0) > 0.9


@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.13.0a"),
    reason=f"PyTorch {torch.__version__} does not compile a step as one graph, 2.13 does: "
    "no compiled step was run",
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"estimator": "shared", "top_k": 64, "max_staleness": None},
        {"staleness_correction": True},
        {"fused": True},
    ],
    ids=str,
)
def test_a_compiled_step_is_the_eager_one(device, options):
    if "fused" in options and device.type != "cuda":
        pytest.skip("there are no kernels for the CPU")
    torch._dynamo.reset()
    model, ids = Towers(device, **options), batches(12, device)
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True)
    found = train(model, ids, step=compiled)
    torch.testing.assert_close(found, train(eager, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [*OPTIONS, {"fused": True}], ids=str)
def test_a_step_in_a_cuda_graph_is_the_eager_one(device, options):
    """One captured step, replayed with other ids: draws, writes and ages go on."""
    if device.type != "cuda":
        pytest.skip("there are no CUDA graphs on the CPU")
    model, ids = Towers(device, **options), batches(14, device)
    train(model, ids[:3], rate=0.0)
    eager, given = copy.deepcopy(model), ids[3].clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for some in ids[3:6]:
            given.copy_(some)
            model(given).backward()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = model(given)
        loss.backward()
    found = []
    for some in ids[6:]:
        given.copy_(some)
        graph.replay()
        found.append(loss.detach().clone())
    expected = [eager(some).detach() for some in ids[3:]][3:]
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=1e-4, atol=1e-4)
    # A capture counts as no step: it runs nothing.
    assert torch.equal(model.loss_fn.cache.age, eager.loss_fn.cache.age)


def test_large_sizes_count_past_two_to_the_31(device):
    """More numbers in a table than an int32 counts: offsets must not wrap."""
    if device.type != "cuda":
        pytest.skip("2.4e9 numbers are for a GPU")
    slots, width = 2**24, 144  # 4.8 GB
    loss_fn = negcache.NegativeCacheLoss(
        slots,
        {"item": negcache.FieldSpec((), torch.int64)},
        embedding=torch.empty(1, width, dtype=torch.bfloat16),
        generator=0,
        max_staleness=None,
    ).to(device)
    table = torch.nn.Embedding(64, width, device=device)
    cache = loss_fn.cache
    cache.age.copy_(torch.arange(slots, device=device) % 1000)
    items = torch.arange(slots, device=device) % 64
    cache.data["item"].copy_(items)
    for start in range(0, slots, 2**21):
        rows = items[start : start + 2**21]
        cache.data["embedding"][start : start + 2**21] = table(rows).detach().to(torch.bfloat16)
    ids = torch.arange(8, device=device)
    loss = loss_fn(lambda rows: table(rows["item"]), table(ids), table(ids), {"item": ids})
    loss.backward()
    assert loss_fn.metrics["staleness"] < 1e-4  # the drawn rows are those that were scored
    assert torch.isfinite(loss)
