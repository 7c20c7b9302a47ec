"""What `make gpu` runs, at small size on the CPU; and that a step asks a device for no value."""

import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def programs():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        import _host_reads as reads  # noqa: PLC0415 - found from here on
        import _kinds_of_steps as kinds  # noqa: PLC0415
        import a_step_asks_the_device_for_nothing as asking  # noqa: PLC0415

        yield SimpleNamespace(reads=reads, kinds=kinds, asking=asking)


def test_a_step_asks_the_device_for_no_value(programs):
    with programs.reads.as_on_a_device():
        found = dict(programs.asking.of_steps(torch.device("cpu")))
    missing = [name for name, reads in found.items() if isinstance(reads, str)]
    assert set(missing) <= set(programs.asking.MAY_BE_MISSING)
    assert {name: reads for name, reads in found.items() if reads and name not in missing} == {}


def test_a_step_copies_nothing_to_or_from_the_device(programs, monkeypatch):
    """On the meta device, which has no values: a copy from the host would be seen."""
    monkeypatch.delitem(programs.kinds.STEPS, "autocast")  # which does not know that device
    found = dict(programs.asking.of_steps(torch.device("meta")))
    assert {name: reads for name, reads in found.items() if reads and type(reads) is list} == {}


def test_what_asks_between_steps_is_documented(programs, tmp_path):
    with programs.reads.as_on_a_device():
        found = dict(programs.asking.between_steps(torch.device("cpu"), tmp_path))
    assert {name for name, reads in found.items() if reads} == set(programs.asking.DOCUMENTED)
    page = (ROOT / "docs" / "gpu.md").read_text()
    assert [name for name in programs.asking.DOCUMENTED if name not in page] == []


def test_a_step_that_asks_is_noticed(programs):
    """The CPU's own ways, which look at values, are found where they stand."""
    device = torch.device("cpu")
    step = programs.kinds.STEPS["id_keys"](device)
    with programs.reads.watched() as found:
        step(programs.kinds.batches(1, device)[0])
    assert {"TorchBackend.read_blocks", "TorchBackend.exclude"} & {read.function for read in found}
    assert all(read.file.startswith("negcache_") and read.code for read in found)


@pytest.mark.parametrize(
    ("function", "operation"),
    [
        (lambda x: float(x[0]), "aten._local_scalar_dense.default"),
        (lambda x: x[x > 0], "aten.index.Tensor"),
        (lambda x: x.tolist(), "Tensor.tolist"),
        (lambda x: x.index_put((x > 0,), torch.zeros(())), "aten.index_put.default"),
        (lambda x: torch.tensor([1.0]) + x, "aten.lift_fresh.default"),
        (lambda x: torch.repeat_interleave(x, x.long()), "aten.repeat_interleave.Tensor"),
        (lambda x: x.to("meta"), "aten._to_copy.default"),
        (lambda x: functional.relu(x)[[0, 1]].sum().item(), "aten._local_scalar_dense.default"),
    ],
    ids=str,
)
def test_each_way_to_wait_is_noticed(programs, function, operation):
    x = torch.arange(3.0)
    with programs.reads.watched() as found:
        function(x)
    assert operation in {read.operation for read in found}
    assert {read.file for read in found} == {Path(__file__).name}


def test_a_read_in_the_backward_pass_is_noticed(programs):
    class Curious(torch.autograd.Function):
        @staticmethod
        def forward(context, x):
            return x.clone()

        @staticmethod
        def backward(context, gradient):
            return gradient * float(gradient.sum())

    x = torch.ones(3, requires_grad=True)
    with programs.reads.watched() as found:
        Curious.apply(x).sum().backward()
    assert [read.function.rpartition(".")[2] for read in found] == ["backward"]


def test_what_cuda_says_is_noted_where_it_is_said(programs, monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with programs.reads.watched() as found:
        for _ in range(2):
            warnings.warn(f"{programs.reads.CUDA_SAYS} (Triggered internally)", stacklevel=1)
    assert modes == ["warn", "default"]
    (read,) = found
    assert (read.operation, read.file) == ("CUDA", Path(__file__).name)
    assert "warnings.warn" in read.code
