"""A step of any kind lets the device work: the host waits for nothing, as PyTorch itself tells."""

import contextlib
import os

import a_step_asks_the_device_for_nothing as asking
import pytest
import torch
from _host_reads import as_on_a_device, watched
from _kinds_of_steps import STEPS, batches

DEVICE = torch.device(os.environ.get("NEGCACHE_DEVICE", "cuda"))


@pytest.fixture(autouse=True)
def _pretending():
    with contextlib.nullcontext() if DEVICE.type == "cuda" else as_on_a_device():
        yield


@pytest.mark.parametrize("name", STEPS)
def test_a_step_waits_for_nothing(name):
    first, *more = batches(4, DEVICE)
    try:
        STEPS[name](DEVICE)(first)  # libraries set themselves up
        step = STEPS[name](DEVICE)
    except (ValueError, TypeError) as error:
        if name not in asking.MAY_BE_MISSING:
            raise
        pytest.skip(f"{name}: {error}")
    with watched() as found:
        for ids in (first, *more):
            step(ids)
    assert found == []


def test_what_waits_between_steps_is_documented(tmp_path):
    for name, found in asking.between_steps(DEVICE, tmp_path):
        assert not asking.undocumented(name, found), (name, found)


def test_cuda_tells():
    """The test of steps could fail: a read is told of, and a copy from the host."""
    x = torch.arange(3.0, device=DEVICE)
    for wait in (lambda: float(x.sum()), lambda: x[x > 1], lambda: torch.tensor([1.0]).to(x) + x):
        with watched() as found:
            wait()
        assert found
    if DEVICE.type == "cuda":
        with watched() as found:
            float(x.sum())
        assert "CUDA" in {read.operation for read in found}
