"""The fused kernels on a device: the cases of their interpreter, and what only a device shows."""

import os
import sys
from pathlib import Path

import programs
import pytest
import torch
from negcache_torch._fused import block_weights, fused_problem

from negcache_core import EMPTY
from negcache_core.arrays.exclusion import Labels

CASES = Path(__file__).parents[1] / "adapters/torch/test_fused.py"
DEVICE = os.environ.get("NEGCACHE_DEVICE", "cuda")
NOTHING = {
    "query_scale": None,
    "row_scale": None,
    "bias": None,
    "labels": Labels(),
    "own": None,
    "block": 128,
}
pytestmark = pytest.mark.skipif(
    fused_problem(torch.empty(0, device=DEVICE)) is not None, reason="needs Triton and its device"
)


def test_kernels_agree_with_the_core():
    programs.run(CASES, PYTHONPATH=os.pathsep.join([str(CASES.parents[2]), *sys.path]))


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
