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
for tests; 0 lowers it without asking for the platform, to export a program for a GPU from a machine
that has none.

Positions: rows and blocks are counted in int32, whether x64 is on or off. Pallas makes offsets into
an array from them, in 64 bits where the array has more than 2**32 bytes and in 32 bits otherwise.
So those are right for tables of any size but int8 ones of between 2**31 and 2**32 numbers, which
are refused.
"""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from negcache_core import EMPTY, OptionError
from negcache_core.arrays.exclusion import Exclusions, Labels
from negcache_core.arrays.numerics import log_sum_exp

from . import _namespace

INTERPRET = "NEGCACHE_PALLAS_INTERPRET"


class _Inputs(NamedTuple):
    """The arrays of `block_weights`, or the kernel's references to them; None for absent ones."""

    queries: Any
    table: Any
    age: Any
    query_scale: Any
    row_scale: Any
    bias: Any
    ids: tuple[Any, ...]
    group: Any
    own_ids: tuple[Any, ...]
    own_group: Any
    ceiling: Any


class _Plan(NamedTuple):
    """How the work is cut; numbers of things that fill an array in the kernel are powers of two.

    tile:   queries of a program, at least the 16 of a matrix unit
    block:  slots in a block
    step:   slots that are scored at a time; a block is one or several steps
    chunk:  numbers of a row that are multiplied at a time
    share:  blocks in a split
    warps:  of a program
    stages: buffers of what a program loads ahead; 1 loads nothing ahead
    """

    tile: int
    block: int
    step: int
    chunk: int
    share: int
    warps: int
    stages: int


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

    float32 products are made in full float32, as all of this package's in JAX are; but with int8
    queries, the mean's weights are rounded to TF32, which holds int8 rows exactly. Weights of half
    rows are rounded to the rows' dtype. Memory beside the results: at most PROGRAMS partial
    readouts of a tile.

    Raises OptionError where the kernel cannot be compiled.
    """
    interpret = _interpreted(queries)
    _check_offsets(table)
    nothing = Exclusions()
    own = nothing if own is None else own
    inputs = _Inputs(
        *(queries, table, age, query_scale, row_scale, bias),
        labels.ids if own.ids else (),
        None if own.group is None else labels.group,
        *(own.ids, own.group, own.ceiling),
    )
    inputs = jax.tree.map(lax.stop_gradient, inputs)
    plan = _plan(inputs, block, readout=readout)
    (rows, width), blocks = queries.shape, -(-table.shape[0] // block)
    splits = -(-blocks // plan.share)
    shapes: list[tuple[int, ...]] = [(blocks, rows)]
    if readout:
        shapes += [(splits, rows), (splits, rows, width)]
    call = pl.pallas_call(
        functools.partial(_kernel, plan=plan),
        grid=(-(-rows // plan.tile), splits),  # neighbours in time share the slots
        out_shape=_float32(shapes, inputs),
        compiler_params=triton.CompilerParams(num_warps=plan.warps, num_stages=plan.stages),
        interpret=interpret,
        name="negcache_block_weights",
    )
    weights, *parts = call(inputs)
    return weights.T, _join(*parts) if readout else None


def _interpreted(queries: Array) -> bool:
    """Return whether to interpret the kernel; raise OptionError if it can neither be compiled."""
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
            f"fused=True on platform {platform!r}: expected a GPU, which the kernel is compiled "
            "for. Give fused=False there."
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
            f"fused=True with a table of {slots} x {width} numbers of {table.dtype}: Pallas has no "
            "offsets for between 2**31 and 2**32 of them. Give fused=False, or fewer slots on each "
            "device."
        )


PROGRAMS = 256
"""Programs to aim for: the largest GPUs run about as many at a time."""

UNROLLED = 2
"""Repetitions in the kernel that are written out; more are a loop."""

SHARED = 96 * 2**10
"""Bytes of operands that a program may hold: every GPU since 2020 has 99 KiB of shared memory."""


def _plan(inputs: _Inputs, block: int, *, readout: bool) -> _Plan:
    """Return how to cut the work; only speed and memory depend on it."""
    (rows, width), slots = inputs.queries.shape, inputs.table.shape[0]
    number = _operand_dtype(inputs.queries, inputs.table).itemsize
    units = number < 4  # matrix units multiply; else threads hold the operands in registers
    chunk = min(128 if units else 32, max(32, pl.next_power_of_2(width)))
    chunks = -(-width // chunk)
    tile = min(64, max(16, pl.next_power_of_2(rows)))
    sums = 2**14 if units else 2**13  # that registers hold
    while readout and tile > 16 and tile * chunk * chunks > sums:
        tile //= 2
    step = min(block, 32 if readout and not units else 64)
    held, ahead = 0, (tile + step) * chunk * number
    if chunks <= UNROLLED:
        held, ahead = tile * chunk * chunks * number, step * chunk * chunks * number
    blocks = -(-slots // block)
    splits = max(1, PROGRAMS // -(-rows // tile))
    return _Plan(
        tile=tile,
        block=block,
        step=step,
        chunk=chunk,
        share=-(-blocks // splits),
        warps=8 if readout and tile * chunk * chunks >= 2**12 else 4,
        stages=max(1, min(3, (SHARED - held) // ahead)),
    )


def _float32(shapes: Sequence[tuple[int, ...]], inputs: _Inputs) -> list[jax.ShapeDtypeStruct]:
    """Describe results of these shapes: in shard_map, they vary wherever an input does."""

    def results(inputs: _Inputs) -> list[Array]:
        used = sum(jnp.sum(each).astype(jnp.float32) for each in jax.tree.leaves(inputs))
        return [jnp.broadcast_to(used, shape) for shape in shapes]

    found: list[jax.ShapeDtypeStruct] = jax.eval_shape(results, inputs)
    return found


def _join(log_partition: Array, mean: Array) -> tuple[Array, Array]:
    """Return the readout (B,), (B, D) of splits (n, B), (n, B, D) together."""
    whole = log_sum_exp(log_partition, 0, xp=_namespace)
    shares = jnp.exp(log_partition - jnp.where(whole > -jnp.inf, whole, 0))
    return whole, jnp.sum(shares[:, :, None] * mean, axis=0)


def _operand_dtype(queries: Any, rows: Any) -> Any:
    """Return the dtype of products: that of both; or of the queries, to which int8 is raised."""
    return jnp.promote_types(queries.dtype, rows.dtype)


def _kernel(inputs: _Inputs, weights: Any, *readout: Any, plan: _Plan) -> None:
    """Weigh the blocks of one split for one tile of queries, and read them out if asked to."""
    tile, split = _Tile.of(inputs, plan), pl.program_id(1)
    zeros = jnp.zeros((plan.tile,), jnp.float32)
    nothing = _Sum(zeros - jnp.inf, zeros)
    steps = jnp.int32(plan.block // plan.step)

    def advance(index: Array, carry: Any) -> Any:
        block, whole, sums = carry
        at, there = _stretch(index * plan.step, plan.step, inputs.table.shape[0])
        written = _load(inputs.age, at, there, EMPTY) != EMPTY
        rows = tile.rows_of(at, written)
        scores = tile.scores(rows, at, written)
        here = _Sum(jnp.max(scores, axis=1), zeros)
        shares = jnp.exp(scores - here.finite_top()[:, None])
        here = here._replace(total=jnp.sum(shares, axis=1))
        begun = lax.rem(index, steps) > 0
        block = _Sum(jnp.where(begun, block.top, -jnp.inf), jnp.where(begun, block.total, 0.0))
        block, _, _ = block.add(here)
        # Each step of a block writes over what the step before wrote.
        triton.store(weights.at[lax.div(index, steps), tile.at], block.log(), mask=tile.there)
        if readout:
            whole, before, now = whole.add(here)
            sums = tile.add_rows(sums, before, shares * now[:, None], rows, at, written)
        return block, whole, sums

    chunks = tile.chunks if readout else ()
    sums = tuple([jnp.zeros((plan.tile, plan.chunk), jnp.float32) for _ in chunks])
    begin = split * (plan.share * plan.block // plan.step)
    end = begin + plan.share * plan.block // plan.step
    end = jnp.minimum(end, -(-inputs.table.shape[0] // plan.step))
    _, whole, sums = lax.fori_loop(begin, end, advance, (nothing, nothing, sums))
    if readout:
        log_partition, mean = readout
        triton.store(log_partition.at[split, tile.at], whole.log(), mask=tile.there)
        tile.write(mean, split, sums, whole.total)


class _Tile(NamedTuple):
    """The queries of one program: where they are, which of those exist, and their facts.

    held: the chunks of the queries, if those are few; else they are loaded again for each step
    """

    inputs: _Inputs
    plan: _Plan
    first: Array
    there: Array
    held: tuple[Array, ...]
    query_scale: Array | None
    group: Array | None
    ceiling: Array | None

    @staticmethod
    def of(inputs: _Inputs, plan: _Plan) -> "_Tile":
        """Load the facts of this program's queries."""
        first = pl.program_id(0) * plan.tile
        at, there = _stretch(first, plan.tile, inputs.queries.shape[0])
        facts = (inputs.query_scale, inputs.own_group, inputs.ceiling)
        tile = _Tile(inputs, plan, first, there, (), *[_load(each, at, there) for each in facts])
        if len(tile.chunks) > UNROLLED:
            return tile
        held = [tile.chunk(inputs.queries, at, there, index) for index in tile.chunks]
        return tile._replace(held=tuple(held))

    @property
    def at(self) -> Any:
        """The positions of the queries."""
        return pl.ds(self.first, self.plan.tile)

    @property
    def chunks(self) -> range:
        """The numbers of the chunks of a row."""
        return range(-(-self.inputs.table.shape[1] // self.plan.chunk))

    def part(self, index: Any) -> tuple[Any, Array]:
        """Return the positions of a chunk in a row, and which of them exist."""
        # Not a constant: Pallas refuses constants for what goes past the end, masked or not.
        start = self.first * 0 + index * self.plan.chunk
        return _stretch(start, self.plan.chunk, self.inputs.table.shape[1])

    def chunk(self, ref: Any, at: Any, there: Array, index: Any) -> Array:
        """Return a chunk of each of some rows."""
        part, inside = self.part(index)
        return cast("Array", _load(ref, (at, part), there[:, None] & inside[None, :]))

    def rows_of(self, at: Any, written: Array) -> "Callable[[Any], Array]":
        """Return a function of the number of a chunk, which returns that of some slots' rows.

        It loads no rows of empty slots, which may be NaN; and few chunks only once.
        """
        load = functools.partial(self.chunk, self.inputs.table, at, written)
        return [load(index) for index in self.chunks].__getitem__ if self.held else load

    def scores(self, rows: Callable[[Any], Array], at: Any, written: Array) -> Array:
        """Return the scores (tile, step) with slots, -inf where one does not count."""
        scores, inputs = self.products(rows), self.inputs
        if self.query_scale is not None:
            scores *= self.query_scale[:, None]
        if inputs.row_scale is not None:
            scores *= _load(inputs.row_scale, at, written)[None, :]
        counts = jnp.broadcast_to(written[None, :], scores.shape)
        for own_ids, ids in zip(inputs.own_ids, inputs.ids, strict=True):
            counts = self.leave_out(counts, own_ids, _load(ids, at, written))
        if self.group is not None:
            counts &= _load(inputs.group, at, written)[None, :] == self.group[:, None]
        if self.ceiling is not None:
            counts &= ~(scores > self.ceiling[:, None])
        if inputs.bias is not None:
            scores -= _load(inputs.bias, at, written)[None, :]
        return jnp.where(counts, scores, -jnp.inf)

    def products(self, rows: Callable[[Any], Array]) -> Array:
        """Return queries @ rows.T (tile, step), a chunk of both at a time."""
        queries = self.inputs.queries
        number = _operand_dtype(queries, self.inputs.table)
        total = jnp.int32 if number == jnp.int8 else jnp.float32

        def add(index: Any, scores: Array, left: Array | None = None) -> Array:
            if left is None:
                left = self.chunk(queries, self.at, self.there, index)
            return scores + lax.dot(
                left.astype(number),
                rows(index).astype(number).T,
                precision=lax.Precision.HIGHEST,
                preferred_element_type=total,
            )

        scores = jnp.zeros((self.plan.tile, self.plan.step), total)
        if not self.held:
            scores = lax.fori_loop(jnp.int32(0), jnp.int32(len(self.chunks)), add, scores)
        for index, left in enumerate(self.held):
            scores = add(index, scores, left)
        return scores.astype(jnp.float32)

    def leave_out(self, counts: Array, own_ids: Any, ids: Array) -> Array:
        """Return counts (tile, step) without rows (step,) that have one of the query's ids."""

        def compare(place: Any, counts: Array) -> Array:
            own = _load(own_ids, (self.at, pl.ds(place, 1)), self.there[:, None])
            return counts & (own != ids[None, :])

        count = own_ids.shape[1]
        if count > UNROLLED:
            return cast("Array", lax.fori_loop(jnp.int32(0), jnp.int32(count), compare, counts))
        for place in range(count):
            counts = compare(place, counts)
        return counts

    def add_rows(
        self,
        sums: tuple[Array, ...],
        before: Array,
        shares: Array,
        rows: Callable[[Any], Array],
        at: Any,
        written: Array,
    ) -> tuple[Array, ...]:
        """Return sums (tile, chunk) of rows by chunk, times `before`, and shares @ rows."""
        inputs = self.inputs
        if inputs.row_scale is not None:
            shares *= _load(inputs.row_scale, at, written)[None, :]
        number, precision = inputs.table.dtype, lax.Precision.HIGHEST
        if number == jnp.int8:
            number = inputs.queries.dtype
        if number == jnp.int8:  # TF32 holds every int8
            number, precision = jnp.dtype(jnp.float32), lax.Precision.HIGH
        added = []
        for index, each in zip(self.chunks, sums, strict=True):
            mixed = lax.dot(
                shares.astype(number),
                rows(index).astype(number),
                precision=precision,
                preferred_element_type=jnp.float32,
            )
            added.append(each * before[:, None] + mixed)
        return tuple(added)

    def write(self, mean: Any, split: Array, sums: tuple[Array, ...], total: Array) -> None:
        """Write the mean of a split's rows."""
        some = jnp.where(total == 0, 1.0, total)
        for index, each in zip(self.chunks, sums, strict=True):
            part, inside = self.part(index)
            kept = self.there[:, None] & inside[None, :]
            triton.store(mean.at[split, self.at, part], each / some[:, None], mask=kept)


def _stretch(start: Any, size: int, count: int) -> tuple[Any, Array]:
    """Return positions start … start + size - 1, and which of them are below `count`."""
    return pl.ds(start, size), start + lax.iota(jnp.int32, size) < count


def _load(ref: Any, at: Any, there: Array, other: int = 0) -> Any:
    """Return a part of an array, `other` where that is not there; None for None."""
    if ref is None:
        return None
    return triton.load(ref.at[at], mask=there, other=jnp.asarray(other, ref.dtype))


class _Sum(NamedTuple):
    """The sum of exponentials of scores, for each query: exp(top) * total."""

    top: Array
    total: Array

    def finite_top(self) -> Array:
        """Return what to subtract from the scores: 0 where none counts."""
        return jnp.where(jnp.abs(self.top) < jnp.inf, self.top, 0.0)

    def log(self) -> Array:
        """Return its logarithm, -inf where no score counts."""
        return jnp.log(self.total) + self.finite_top()

    def add(self, more: "_Sum") -> tuple["_Sum", Array, Array]:
        """Return both together, and the factors of each total that this takes."""
        both = _Sum(jnp.maximum(self.top, more.top), self.total)
        ours, theirs = (jnp.exp(each - both.finite_top()) for each in (self.top, more.top))
        return both._replace(total=self.total * ours + more.total * theirs), ours, theirs
