"""What one program of the fused kernel does, and how the work is cut into programs."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from negcache_core import EMPTY


class Inputs(NamedTuple):
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


class Plan(NamedTuple):
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


PROGRAMS = 256
"""Programs to aim for: one or two for each multiprocessor of the largest GPUs."""

UNROLLED = 2
"""Repetitions that are written out; more are a loop."""

SHARED = 96 * 2**10
"""Bytes of operands that a program may hold, of the 99 KiB that GPUs of compute capability 8.0 and
up have at least.
"""


def plan_work(inputs: Inputs, block: int, *, readout: bool) -> Plan:
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
    return Plan(
        tile=tile,
        block=block,
        step=step,
        chunk=chunk,
        share=-(-blocks // splits),
        warps=8 if readout and tile * chunk * chunks >= 2**12 else 4,
        stages=max(1, min(3, (SHARED - held) // ahead)),
    )


def _operand_dtype(queries: Any, rows: Any) -> Any:
    """Return the dtype of products: that of both; or of the queries, to which int8 is raised."""
    return jnp.promote_types(queries.dtype, rows.dtype)


def kernel(inputs: Inputs, weights: Any, *readout: Any, plan: Plan) -> None:
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

    inputs: Inputs
    plan: Plan
    first: Array
    there: Array
    held: tuple[Array, ...]
    query_scale: Array | None
    group: Array | None
    ceiling: Array | None

    @staticmethod
    def of(inputs: Inputs, plan: Plan) -> "_Tile":
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

    def rows_of(self, at: Any, written: Array) -> Callable[[Any], Array]:
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
            number = jnp.dtype(jnp.float32)
            if inputs.queries.dtype != number:  # TF32 holds every int8
                precision = lax.Precision.HIGH
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
