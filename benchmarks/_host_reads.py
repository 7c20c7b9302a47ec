"""Finds where a program makes the host wait for its device.

On CUDA, PyTorch itself tells (`torch.cuda.set_sync_debug_mode`). Anywhere else, a mode around the
program sees each operation: those whose result depends on values, those that move an array between
devices, and those that make an array of the host's numbers. On the CPU nothing waits, but the same
operations are found: see `as_on_a_device`.
"""

import contextlib
import linecache
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from negcache_torch import _backend, _namespace
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from negcache_core.adapter import ACCELERATOR_TILE

OURS = ("negcache_core/", "negcache_torch/")
TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
BY_MASK = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
TO_PYTHON = {"tolist", "numpy", "cpu", "__array__"}  # on the CPU these are no operations
BETWEEN = ("/warnings.py", "/_host_reads.py")  # the way from what waits to `_note`
CUDA_SAYS = "called a synchronizing CUDA operation"


class Read(NamedTuple):
    """A place where the host waits: the operation, and the innermost line of negcache."""

    operation: str
    file: str
    function: str
    line: int
    code: str


@contextlib.contextmanager
def watched() -> Iterator[list[Read]]:
    """Give a list, to which each read within is added, once for each place and operation."""
    found: list[Read] = []
    with contextlib.ExitStack() as stack:
        if torch.cuda.is_available():
            stack.enter_context(_told_by_cuda(found))
        stack.enter_context(_Calls(found))
        stack.enter_context(_Operations(found))
        yield found


@contextlib.contextmanager
def as_on_a_device() -> Iterator[None]:
    """Let PyTorch's adapter do on the CPU what it does on CUDA."""
    with (
        mock.patch.object(_backend, "_values_are_at_hand", return_value=False),
        mock.patch.object(_backend, "CPU_TILE", ACCELERATOR_TILE),
        mock.patch.object(_backend.TorchBackend, "multiplies_as_stored", _is_narrow),
        mock.patch.object(_namespace, "product_of_halves", _product_in_float32),
    ):
        yield


def _is_narrow(_: Any, table: torch.Tensor) -> bool:
    return table.dtype in (torch.int8, *_backend.HALVES)


def _product_in_float32(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return left.float() @ right.float()


class _Operations(TorchDispatchMode):
    """Sees the operations of PyTorch's C++ side, the backward pass included."""

    def __init__(self, found: list[Read]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if _waits(func, args, kwargs):
            _note(self.found, str(func))
        return func(*args, **kwargs)


def _waits(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    name = func.__name__.partition(".")[0]
    if name in BY_MASK:
        indices = [each for each in args[1] if each is not None]
        if any(each.dtype in (torch.bool, torch.uint8) for each in indices):
            return True
    elif TAGS & set(func.tags) and kwargs.get("output_size") is None:
        return True
    if name == "lift_fresh":  # torch.tensor and torch.as_tensor, of what the host has
        return True
    given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
    devices = {each.device for each in given if each.ndim}
    if name in ("copy_", "_to_copy"):
        devices = {each.device for each in given} | ({kwargs.get("device")} - {None})
    return len(devices) > 1


class _Calls(TorchFunctionMode):
    """Sees the methods that hand an array to Python."""

    def __init__(self, found: list[Read]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in TO_PYTHON:
            _note(self.found, f"Tensor.{name}")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _told_by_cuda(found: list[Read]) -> Iterator[None]:
    def note(message: Any, *_: Any, **__: Any) -> None:
        if CUDA_SAYS in str(message):
            _note(found, "CUDA")

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def _note(found: list[Read], operation: str) -> None:
    frame: Any = sys._getframe(1)  # noqa: SLF001 - no other way is as cheap
    outside = None
    while frame is not None:
        path = Path(frame.f_code.co_filename).as_posix()
        for package in OURS:
            if f"/{package}" in path:
                return _add(found, operation, package + path.rpartition(f"/{package}")[2], frame)
        if outside is None and not path.endswith(BETWEEN) and "/torch/" not in path:
            outside = frame
        frame = frame.f_back
    # Not below negcache: the caller's own lines, or a backward pass.
    return _add(found, operation, Path(outside.f_code.co_filename).name, outside)


def _add(found: list[Read], operation: str, file: str, frame: Any) -> None:
    code = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
    read = Read(operation, file, frame.f_code.co_qualname, frame.f_lineno, code)
    if read not in found:
        found.append(read)
