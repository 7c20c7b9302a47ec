"""The fused kernels, compiled: the cases that `make test` interprets, and trainings with them.

On the CPU, with NEGCACHE_DEVICE=cpu, they run if both are interpreted: TRITON_INTERPRET=1 and
NEGCACHE_PALLAS_INTERPRET=1.
"""

import os
import sys
from pathlib import Path

import jax
import negcache_jax
import negcache_torch as negcache
import numpy as np
import programs
import pytest
import test_fused_jax as in_jax
import torch
from negcache_torch._fused import block_weights, fused_problem

from negcache_core import EMPTY
from negcache_core.arrays.exclusion import Labels

CASES = Path(__file__).parents[1] / "adapters/torch/test_fused.py"
DEVICE = os.environ.get("NEGCACHE_DEVICE", "cuda")
INTERPRETED = [
    os.environ.get(name) == "1" for name in ("TRITON_INTERPRET", "NEGCACHE_PALLAS_INTERPRET")
]
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not all(INTERPRETED), reason="there are no kernels for the CPU"
)
NOTHING = {
    "query_scale": None,
    "row_scale": None,
    "bias": None,
    "labels": Labels(),
    "own": None,
    "block": 128,
}
SLOTS, WIDTH, BATCH = 1_024, 32, 24
OPTIONS = [{}, {"id_keys": ("id",), "margin": 0.5, "num_samples": 2}, {"estimator": "shared"}]


WITH_TRITON = pytest.mark.skipif(
    fused_problem() is not None, reason=f"fused=True cannot run: {fused_problem()}"
)


@WITH_TRITON
def test_triton_kernels_agree_with_the_core():
    programs.run(CASES, PYTHONPATH=os.pathsep.join([str(CASES.parents[2]), *sys.path]))


@WITH_TRITON
@pytest.mark.skipif(DEVICE == "cpu", reason="2.1e9 numbers are for a GPU")
def test_a_table_of_more_than_2_31_numbers():
    slots, width, held = 2**21 + 200, 1024, 5
    queries = torch.ones((2, width), dtype=torch.int8, device=DEVICE)
    table = torch.zeros((slots, width), dtype=torch.int8, device=DEVICE)
    table[-held:] = torch.arange(held, dtype=torch.int8, device=DEVICE)[:, None]
    age = torch.full((slots,), EMPTY, dtype=torch.int32, device=DEVICE)
    age[-held:] = 0
    scales = {
        "query_scale": torch.full((2,), 1 / width, device=DEVICE),
        "row_scale": torch.ones(slots, device=DEVICE),
    }
    scores = torch.arange(float(held))
    given = (queries, table, age)
    for readout in (False, True):
        weights, read = block_weights(*given, **{**NOTHING, **scales}, readout=readout)
        assert weights[:, :-1].isneginf().all()
        torch.testing.assert_close(weights[:, -1].cpu(), scores.logsumexp(0).expand(2))
    expected = (scores.softmax(0) * scores).sum().expand(2, width)
    torch.testing.assert_close(read[1].cpu(), expected, rtol=2e-3, atol=0)


@WITH_TRITON
@pytest.mark.skipif(DEVICE != "cuda", reason="graphs are of CUDA")
def test_a_graph_repeats_it_exactly():
    torch.manual_seed(0)
    queries = torch.randn((40, 768), device=DEVICE, dtype=torch.bfloat16) / 8
    table = torch.randn((100_000, 768), device=DEVICE, dtype=torch.bfloat16)
    age = torch.zeros(100_000, dtype=torch.int32, device=DEVICE)
    weights, read = block_weights(queries, table, age, **NOTHING, readout=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found, again = block_weights(queries, table, age, **NOTHING, readout=True)
    for _ in range(2):
        graph.replay()
        assert all(map(torch.equal, (found, *again), (weights, *read)))


@pytest.mark.parametrize("dtypes", ["float32", "float16", "bfloat16", "int8"])
def test_pallas_kernels_of_each_dtype_agree_with_the_core(dtypes, monkeypatch):
    in_jax.test_every_dtype_with_all_masks(dtypes, dtypes, monkeypatch)


@pytest.mark.parametrize(
    "case",
    [
        in_jax.test_masks_alone,
        in_jax.test_data_that_one_program_has_to_bear,
        in_jax.test_a_nan_is_not_above_a_ceiling_and_stays_in_its_block,
        in_jax.test_fewer_slots_than_a_block_in_32_bits,
        in_jax.test_no_gradient_flows_and_none_is_asked_of_the_kernel,
        in_jax.test_inside_shard_map_results_vary_as_the_inputs_do,
    ],
    ids=lambda case: case.__name__,
)
def test_pallas_kernels_agree_with_the_core(case):
    case()


def data():
    rng = np.random.default_rng(0)
    items = rng.standard_normal((300, WIDTH)).astype(np.float32)
    items /= np.linalg.norm(items, axis=1, keepdims=True)
    return items, rng.integers(0, len(items), (12, BATCH)).astype(np.int32)


def losses_in_torch(storage, options):
    """Return the losses of towers that stand still: which rows are drawn changes nothing."""
    items, batches = (torch.asarray(each).to(DEVICE) for each in data())
    loss_fn = negcache.NegativeCacheLoss(
        SLOTS,
        {"item": negcache.FieldSpec((), torch.int32)},
        negcache.FieldSpec((WIDTH,), storage),
        labels={"id": negcache.FieldSpec((), torch.int32)},
        generator=0,
        **options,
    ).to(DEVICE)
    items.requires_grad_()
    found = []
    for ids in batches:
        rows = items[ids.long()]
        queries = torch.nn.functional.normalize(rows + 0.3 * items[ids.long() - 1], dim=1)
        loss = loss_fn(
            lambda features: items[features["item"].long()],
            queries,
            rows,
            {"item": ids},
            labels={"id": ids},
        )
        loss.backward()
        found.append(float(loss.detach()))
    assert torch.isfinite(items.grad).all()
    return found


def losses_in_jax(storage, options):
    items, batches = data()
    loss_fn = negcache_jax.NegativeCacheLoss(
        SLOTS,
        {"item": negcache_jax.FieldSpec((), "int32")},
        negcache_jax.FieldSpec((WIDTH,), storage),
        labels={"id": negcache_jax.FieldSpec((), "int32")},
        **options,
    )

    @jax.jit
    def step(state, items, ids):
        def loss(items):
            rows = items[ids]
            queries = rows + 0.3 * items[ids - 1]
            queries /= jax.numpy.linalg.norm(queries, axis=1, keepdims=True)
            network = lambda features: items[features["item"]]  # noqa: E731 - as a user writes it
            return loss_fn(state, network, queries, rows, {"item": ids}, labels={"id": ids})

        (value, state), gradient = jax.value_and_grad(loss, has_aux=True)(items)
        return value, state, jax.numpy.isfinite(gradient).all()

    state, found = loss_fn.init(jax.random.key(0)), []
    for ids in batches:
        value, state, finite = step(state, items, ids)
        assert finite
        found.append(float(value))
    return found


@pytest.mark.parametrize("losses_in", [losses_in_torch, losses_in_jax])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8"])
def test_losses_are_those_without_kernels(losses_in, options, storage):
    plain = losses_in(storage, options)
    try:
        fused = losses_in(storage, {**options, "fused": True})
    except negcache.OptionError as error:
        pytest.skip(str(error))
    rounded = 1e-4 if storage == "float32" else 0.02  # of losses of 0.1 to 0.7
    np.testing.assert_allclose(fused, plain, atol=rounded)
    np.testing.assert_allclose(plain, losses_in("float32", options), atol=0.05)
