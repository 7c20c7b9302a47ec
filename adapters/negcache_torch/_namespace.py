"""The few array functions that the core calls, in PyTorch.

array-api-compat has them too, but computes each result's dtype in Python: torch.compile cannot
trace that, and it costs more than a small operation.
"""

import contextlib
import math
import operator
import sys
from typing import Any

import torch
from torch import Tensor

from negcache_core.arrays._array import largest_by_keys

bool = torch.bool
float16, bfloat16, float32, float64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
int8, int16, int32, int64 = torch.int8, torch.int16, torch.int32, torch.int64
uint8, uint16, uint32, uint64 = torch.uint8, torch.uint16, torch.uint32, torch.uint64

abs, exp, log, log1p, isfinite = torch.abs, torch.exp, torch.log, torch.log1p, torch.isfinite
sqrt, round = torch.sqrt, torch.round
arange, zeros, full, full_like = torch.arange, torch.zeros, torch.full, torch.full_like
ones_like, where, reshape = torch.ones_like, torch.where, torch.reshape
broadcast_to, concat = torch.broadcast_to, torch.cat
all, any, mean, max, argmax = torch.all, torch.any, torch.mean, torch.amax, torch.argmax
min = torch.amin
argsort, topk, clip = torch.argsort, torch.topk, torch.clip
subtract, multiply = torch.subtract, torch.multiply
finfo, searchsorted, zeros_like = torch.finfo, torch.searchsorted, torch.zeros_like

index_dtype = int64
LOG2_E = math.log2(math.e)

_THIS = sys.modules[__name__]

# PyTorch has no indexed writes for these: the same bits are written through a signed view.
UNSIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}


# These run no Python code.
astype, take_rows, sum = torch.Tensor.to, operator.getitem, torch.sum


def device_of(array: Tensor) -> torch.device:
    return array.device


def asarray(value: Any, *, copy: Any = None) -> Tensor:
    return torch.asarray(value, copy=copy)


def maximum(left: Tensor, right: Any) -> Tensor:
    return torch.maximum(left, right) if isinstance(right, Tensor) else left.clamp(min=right)


def minimum(left: Tensor, right: Any, out: Tensor | None = None) -> Tensor:
    if isinstance(right, Tensor):
        return torch.minimum(left, right, out=out)
    return left.clamp(max=right)


def exp_difference(left: Tensor, right: Tensor) -> Tensor:
    # On a CPU, exp takes up to a hundred times as long if it underflows; exp2 does not.
    right = torch.mul(right, -LOG2_E).clamp_(max=torch.finfo(right.dtype).max)
    return torch.exp2(torch.add(right, left, alpha=LOG2_E, out=left), out=left)


def take(array: Tensor, indices: Tensor, axis: int) -> Tensor:
    return torch.index_select(array, axis, indices)


def nonzero(array: Tensor) -> tuple[Tensor, ...]:
    return torch.nonzero(array, as_tuple=True)


def sort(array: Tensor) -> Tensor:
    return torch.sort(array).values


def cumulative_sum(array: Tensor, axis: int) -> Tensor:
    if not (array.is_cuda and torch.are_deterministic_algorithms_enabled()):
        return torch.cumsum(array, axis)
    return sums_by_doubling(array, axis)  # torch.cumsum would raise


def sums_by_doubling(array: Tensor, axis: int) -> Tensor:
    """Return cumulative sums, in an order that is always the same."""
    size, step = array.shape[axis], 1
    while step < size:
        start, rest = array.narrow(axis, 0, step), array.narrow(axis, step, size - step)
        array = torch.cat([start, rest + array.narrow(axis, 0, size - step)], axis)
        step *= 2
    return array


def matrix_transpose(array: Tensor) -> Tensor:
    return array.mT


def matmul(left: Tensor, right: Tensor) -> Tensor:
    device = left.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        with as_wide_as_given(left):
            return torch.matmul(left, right)
    return torch.matmul(left, right)


def matmul_transposed(left: Tensor, right: Tensor) -> Tensor:
    return matmul(left, right.mT)


SUMS_HALVES_IN_FLOAT32 = "dtype" in torch.ops.aten.mm.overloads()


def product_of_halves(left: Tensor, right: Tensor) -> Tensor:
    """Return left @ right, of one half type, added up and returned in float32; on CUDA."""
    return torch.mm(left, right, out_dtype=torch.float32)


def as_wide_as_given(array: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which products keep their dtype, even inside the user's autocast."""
    return torch.autocast(array.device.type, enabled=False)


def largest(values: Tensor, count: int) -> Tensor:
    return largest_by_keys(_select, values, count, _THIS)


def _select(keys: Tensor, count: int) -> Tensor:
    return torch.topk(keys, count).indices


def signed(array: Tensor) -> Tensor:
    """Return a view of the same bits, in a dtype that indexed writes support."""
    return array.view(UNSIGNED[array.dtype])


def put_rows(table: Tensor, slots: Tensor, rows: Tensor) -> Tensor:
    if table.dtype in UNSIGNED:
        return signed(table).index_copy(0, slots, signed(rows)).view(table.dtype)
    return table.index_copy(0, slots, rows)
