"""Block weights and the readout of a cache in one kernel: scores are never written to memory.

The kernels are Triton's, which is imported when they first run.
"""

import importlib.util
import os
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from negcache_core.arrays.exclusion import Exclusions, Labels
from negcache_core.cache.state import EMPTY
from negcache_core.errors import OptionError


def fused_problem(array: Tensor | None = None) -> str | None:
    """Return why the kernels cannot run, and what to do; None where they can.

    array: it must be where they can run; None asks only whether they can run anywhere
    """
    if importlib.util.find_spec("triton") is None:
        return (
            "Triton is not installed. Install it (`pip install triton`; PyTorch for CUDA brings it"
            " along), or leave fused=True out."
        )
    if not (array is None or array.is_cuda or _interprets()):
        return (
            f"got arrays on {array.device}, expected them on a CUDA device. Move the cache and the"
            " model there, or leave fused=True out. To debug on a CPU, set the environment"
            " variable TRITON_INTERPRET=1 before the program starts."
        )
    if "tensorflow" in sys.modules and "triton" not in sys.modules:
        return (
            "TensorFlow was imported, and Triton was not yet: in this order they end the process."
            " Add `import triton` above `import tensorflow`."
        )
    return None


def check(array: Tensor | None = None) -> None:
    """Raise OptionError where the kernels cannot run; see `fused_problem`."""
    problem = fused_problem(array)
    if problem is not None:
        raise OptionError(f"fused=True cannot run: {problem}")


def _interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def block_weights(
    queries: Tensor,
    table: Tensor,
    age: Tensor,
    *,
    query_scale: Tensor | None,
    row_scale: Tensor | None,
    bias: Tensor | None,
    labels: Labels,
    own: Exclusions | None,
    block: int,
    readout: bool,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Return the log-sum-exp of every block's scores, (B, blocks), and the readout.

    queries:     (B, D), scaled: float32, float16, bfloat16, or int8 with query_scale (B,)
    table:       (C, D) float32, float16, bfloat16 or int8; row_scale (C,) or None multiplies rows
    age:         (C,) int32
    bias:        (C,) float32 subtracted from each row's scores, or None
    labels, own: what must not be a negative of each query
    block:       slots in a block, a power of two from 16

    The readout is the log-partition (B,) and the mean row (B, D), or None. All are float32.
    Raises OptionError where the kernels cannot run.
    """
    own = own or Exclusions()
    weights, *read = _run(
        queries,
        table,
        age,
        query_scale,
        row_scale,
        bias,
        list(labels.ids) if own.ids else [],
        list(own.ids),
        None if own.group is None else labels.group,
        own.group,
        own.ceiling,
        block,
        readout,
    )
    return weights.T, (read[0], read[1]) if readout else None


@torch.library.custom_op("negcache::block_weights", mutates_args=())  # opaque to torch.compile
def _run(
    queries: Tensor,
    table: Tensor,
    age: Tensor,
    query_scale: Tensor | None,
    row_scale: Tensor | None,
    bias: Tensor | None,
    ids: Sequence[Tensor],
    own_ids: Sequence[Tensor],
    group: Tensor | None,
    own_group: Tensor | None,
    ceiling: Tensor | None,
    block: int,
    readout: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run a kernel; return weights (blocks, B), and the readout's arrays, empty if not needed."""
    check(table)
    if not queries.shape[0]:
        return _shapes(queries, table, block, readout)
    from . import _fused_kernels as kernels  # noqa: PLC0415 - Triton is optional

    facts = (queries, table, age, query_scale, row_scale, bias)
    marks = (group, own_group, ceiling)
    (count, width), slots, blocks = queries.shape, table.shape[0], -(-table.shape[0] // block)
    weights = queries.new_empty((blocks, count), dtype=torch.float32)
    scoring, reading = _types(queries, table)
    # The older torch.get_float32_matmul_precision() raises if this was set in the newer way.
    ieee = torch.backends.cuda.matmul.fp32_precision != "tf32"
    options = {
        "D": width,
        "places": tuple([each.shape[1] for each in own_ids]),
        "EMPTY": EMPTY,
        "OPERAND": _triton_type(scoring),
        "PRECISION": "ieee" if ieee else "tf32",
        "BLOCK": block,
    }
    given = (*map(_plain, facts), tuple(map(_plain, ids)), tuple(map(_plain, own_ids)))
    given += tuple(map(_plain, marks))
    with torch.cuda.device_of(queries):  # Triton launches on the current one
        if not readout:
            plan = plan_weights(count, width, scoring, block)
            kernels.weigh[-(-count // plan.rows) * blocks,](
                *given,
                weights,
                count,
                slots,
                **options,
                BLOCK_B=plan.rows,
                BLOCK_K=plan.columns,
                num_warps=plan.warps,
                num_stages=plan.stages,
            )
            return weights, weights.new_empty(0), weights.new_empty(0)
        plan = plan_readout(count, width, scoring, reading, block)
        tiles = -(-count // plan.rows) * -(-width // (plan.first + plan.second))
        stretch = -(-blocks // max(1, min(blocks, _programs(queries) // tiles)))
        splits = -(-blocks // stretch)
        logs = weights.new_empty((splits, count))
        means = weights.new_empty((splits, count, width))
        kernels.read[tiles * splits,](
            *given,
            weights,
            logs,
            means,
            count,
            slots,
            stretch,
            **options,
            READ=_triton_type(reading),
            ROUNDED=_triton_type(reading, exact=True),
            BLOCK_B=plan.rows,
            BLOCK_N=plan.slots,
            BLOCK_K=plan.columns,
            FIRST=plan.first,
            SECOND=plan.second,
            num_warps=plan.warps,
            num_stages=plan.stages,
        )
    log_partition = torch.logsumexp(logs, 0)
    # No slot counts where it is -inf: its shares and its mean are 0.
    shares = torch.exp(logs - torch.where(log_partition == -torch.inf, 0.0, log_partition))
    return weights, log_partition, means.mul_(shares[:, :, None]).sum(0)


@_run.register_fake
def _shapes(queries: Tensor, table: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return arrays like those of `_run`, without values."""
    block, readout = others[-2:]
    count, blocks = queries.shape[0], -(-table.shape[0] // block)
    weights = queries.new_empty((blocks, count), dtype=torch.float32)
    if not readout:
        return weights, weights.new_empty(0), weights.new_empty(0)
    return weights, weights.new_empty(count), weights.new_empty(queries.shape)


def _plain(array: Tensor | None) -> Tensor | None:
    """Return an array as the kernels read it; a cache's fields already are, and are not copied."""
    if array is None:
        return None
    array = array.contiguous()
    return array.view(torch.uint8) if array.dtype == torch.bool else array


def _types(queries: Tensor, table: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """Return what is multiplied for the scores and for the mean row.

    Integers are exact in float16, which rounds the softmax less than bfloat16.
    """
    if queries.dtype != torch.float32 and table.dtype == torch.int8:
        return queries.dtype, torch.float16
    return queries.dtype, queries.dtype


def _triton_type(dtype: torch.dtype, *, exact: bool = False) -> Any:
    """Return Triton's type of the same name. The interpreter cannot multiply bfloat16."""
    from triton import language  # noqa: PLC0415 - Triton is optional

    if dtype == torch.bfloat16 and _interprets() and not exact:
        return language.float32
    return getattr(language, str(dtype).removeprefix("torch."))


class Plan(NamedTuple):
    """What a program works on at a time: powers of two, not measured on a device yet.

    rows:          queries
    slots:         slots
    columns:       columns of the products that are summed to scores
    first, second: columns of the mean row, in two accumulators
    """

    rows: int
    slots: int
    columns: int
    warps: int
    stages: int
    first: int = 0
    second: int = 0


def plan_weights(count: int, width: int, scoring: torch.dtype, block: int) -> Plan:
    """Return the plan for weights alone: a tile of up to 64 queries by a block."""
    return Plan(min(64, max(16, _power(count))), block, _columns(width, scoring), 4, 3)


def plan_readout(
    count: int, width: int, scoring: torch.dtype, reading: torch.dtype, block: int
) -> Plan:
    """Return the plan for weights and the readout.

    The accumulators of the mean row have at most 64 registers of a thread, and the rows that they
    read 32 KiB of shared memory, or 64 KiB for 16 of float32.
    """
    width = -(-width // -(-width // MOST_COLUMNS))
    first = max(16, _power(width) // 2)
    second = max(16, _power(width - first))
    if second >= first:
        first, second = max(16, _power(width)), 0
    rows = min(32 if first + second <= 512 else 16, max(16, _power(count)))
    slots = min(block, 128 // reading.itemsize, max(16, 32_768 // (first * reading.itemsize)))
    return Plan(rows, slots, _columns(width, scoring), 8, 2, first, second)


MOST_COLUMNS = 1024
"""Columns of the mean row in a program; of wider ones each program has a part."""


def _columns(width: int, scoring: torch.dtype) -> int:
    """Return 128 bytes' worth of columns, or all; a product needs 16, of integers 32."""
    least, most = (32, 128) if scoring == torch.int8 else (16, 128 // scoring.itemsize)
    return min(most, max(least, _power(width)))


def _power(number: int) -> int:
    """Return the lowest power of two that is not lower."""
    return 1 << max(0, number - 1).bit_length()


def _programs(array: Tensor) -> int:
    """Return how many programs to share the slots among."""
    if not array.is_cuda:
        return 4  # of the interpreter: enough for several stretches
    return 2 * torch.cuda.get_device_properties(array.device).multi_processor_count
