"""The fused kernel of streaming retrieval, in Pallas: scores never reach memory.

A program takes a tile of queries and a stretch of slots, the split. For each block of slots it
makes the products, applies the masks, and writes one number per query: the log-sum-exp. For the
readout it also keeps a running maximum, sum and weighted sum of rows, as flash attention does; a
few operations outside of the kernel join the splits.

The kernel is lowered by way of Triton, for NVIDIA GPUs; a TPU is not a goal. Programs are
independent of each other. Rows are cut into chunks of a power of two numbers, the last one masked,
so any width is fine.

Where it runs is decided at each trace. By default it must be a GPU. The environment variable
NEGCACHE_PALLAS_INTERPRET changes that: 1 interprets the kernel, on any platform and very slowly,
for tests, and in `shard_map` only with check_vma=False, which JAX's interpreter needs; 0 lowers it
without asking for the platform, to export a program for a GPU from a machine that has none.

Positions: rows and blocks are counted in int32, whether x64 is on or off. Pallas makes offsets into
an array from them, in 64 bits where the array has more than 2**32 bytes and in 32 bits otherwise.
So those are right for tables of any size but int8 ones of between 2**31 and 2**32 numbers, which
are refused.
"""

import functools
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from negcache_core import OptionError
from negcache_core.arrays.exclusion import Exclusions, Labels
from negcache_core.arrays.numerics import log_sum_exp

from . import _namespace
from ._fused_kernel import Inputs, kernel, plan_work

INTERPRET = "NEGCACHE_PALLAS_INTERPRET"


def block_weights(
    queries: Array,
    table: Array,
    age: Array,
    *,
    query_scale: Array | None,
    row_scale: Array | None,
    bias: Array | None,
    labels: Labels,
    own: Exclusions | None,
    block: int,
    readout: bool,
) -> tuple[Array, tuple[Array, Array] | None]:
    """Return the log-sum-exp of each block of slots, and the readout of all slots.

    queries:     (B, D) float32, float16 or bfloat16; or int8 with query_scale
    table:       (C, D) of those dtypes; rows of empty slots may hold anything
    age:         (C,) int32, EMPTY for an empty slot
    query_scale: (B,) multiplies int8 queries, or None
    row_scale:   (C,) multiplies the rows of an int8 table, or None
    bias:        (C,) subtracted from each row's scores, or None
    labels, own: which rows do not count for which queries
    block:       slots in a block, a power of two
    readout:     whether to return it

    Returns weights (B, ceil(C / block)), -inf where no slot counts; and, if asked for, the
    log-partition (B,), -inf where none counts, and the mean (B, D) of rows by their softmax, 0
    where none counts. All are float32. No gradient flows through them.

    Products of float32 are made in full float32, as all of this package's in JAX are. For the mean,
    the weights of half rows are rounded to the rows' dtype; those of int8 rows to TF32, which holds
    every int8, unless queries are float32. Memory besides the results: at most PROGRAMS partial
    readouts of a tile of queries.

    Raises OptionError where the kernel cannot be compiled.
    """
    interpret = _interpreted(queries)
    _check_offsets(table)
    own = own or Exclusions()
    inputs = Inputs(
        *(queries, table, age, query_scale, row_scale, bias),
        labels.ids if own.ids else (),
        None if own.group is None else labels.group,
        *(own.ids, own.group, own.ceiling),
    )
    inputs = jax.tree.map(lax.stop_gradient, inputs)
    (rows, width), blocks = queries.shape, -(-table.shape[0] // block)
    if not rows:  # Pallas has no grid without programs
        none = [jnp.zeros(shape, jnp.float32) for shape in ((0, blocks), (0,), (0, width))]
        return none[0], (none[1], none[2]) if readout else None
    plan = plan_work(inputs, block, readout=readout)
    splits = -(-blocks // plan.share)
    shapes: list[tuple[int, ...]] = [(blocks, rows)]
    if readout:
        shapes += [(splits, rows), (splits, rows, width)]
    call = pl.pallas_call(
        functools.partial(kernel, plan=plan),
        grid=(-(-rows // plan.tile), splits),  # neighbours in time share the slots
        out_shape=_float32(shapes, inputs),
        compiler_params=triton.CompilerParams(num_warps=plan.warps, num_stages=plan.stages),
        interpret=interpret,
        name="negcache_block_weights",
    )
    weights, *parts = call(inputs)
    return weights.T, _join(*parts) if readout else None


def _interpreted(queries: Array) -> bool:
    """Return whether to interpret the kernel; raise OptionError where it cannot be compiled."""
    chosen = os.environ.get(INTERPRET, "")
    if chosen not in {"", "0", "1"}:
        raise OptionError(f"{INTERPRET}={chosen}: expected 0 or 1. Leave it out to compile.")
    if not hasattr(triton, "load"):
        raise OptionError(
            f"fused=True with JAX {jax.__version__}: the kernel needs JAX 0.8 or newer. Install "
            "that, or give fused=False."
        )
    if chosen:
        return chosen == "1"
    platform = _platform(queries)
    if platform not in {"gpu", "cuda", "rocm"}:
        raise OptionError(
            f"fused=True on platform {platform!r}: the kernel compiles for GPUs only. Run this on "
            "a GPU, or give fused=False."
        )
    return False


def _platform(array: Array) -> str:
    """Return where the kernel will run: where the array is, or JAX's default while it is traced."""
    if not isinstance(array, jax.core.Tracer):
        return next(iter(array.devices())).platform
    chosen: Any = jax.config.jax_default_device  # type: ignore[attr-defined] # it has no types
    return getattr(chosen, "platform", chosen) or jax.default_backend()


def _check_offsets(table: Array) -> None:
    """Refuse tables whose offsets would wrap: past 2**31 numbers, but 32-bit up to 2**32 bytes."""
    slots, width = table.shape
    if slots * width > 2**31 and slots * width * table.dtype.itemsize <= 2**32:
        raise OptionError(
            f"fused=True with a table of {slots} x {width} numbers of {table.dtype}: of between "
            "2**31 and 2**32 such numbers, Pallas gets the offsets wrong. Give fused=False, or "
            "keep fewer slots on each device."
        )


def _float32(shapes: Sequence[tuple[int, ...]], inputs: Inputs) -> list[jax.ShapeDtypeStruct]:
    """Describe results of these shapes: in shard_map, they vary wherever an input does."""

    def results(inputs: Inputs) -> list[Array]:
        used = sum(jnp.sum(each).astype(jnp.float32) for each in jax.tree.leaves(inputs))
        return [jnp.broadcast_to(used, shape) for shape in shapes]

    found: list[jax.ShapeDtypeStruct] = jax.eval_shape(results, inputs)
    return found


def _join(log_partition: Array, mean: Array) -> tuple[Array, Array]:
    """Return the readout (B,), (B, D) of splits (n, B), (n, B, D) together."""
    whole = log_sum_exp(log_partition, 0, xp=_namespace)
    shares = jnp.exp(log_partition - jnp.where(whole > -jnp.inf, whole, 0))
    return whole, jnp.sum(shares[:, :, None] * mean, axis=0)
