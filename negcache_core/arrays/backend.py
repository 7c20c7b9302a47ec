"""What an array library supplies beyond the array API: a few verbs, with NumPy's as default."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Generic

import numpy as np

from negcache_core.arrays._array import (
    Array,
    ArrayT,
    cast,
    concat_rows,
    fill,
    namespace,
    numpy_namespace,
)
from negcache_core.arrays.exclusion import Exclusions, Labels, exclude_in_place, excluded
from negcache_core.arrays.numerics import (
    block_log_sum_exp_in_place,
    log_sum_exp,
    read_out,
)
from negcache_core.errors import KindError, OptionError

CPU_TILE = 4 * 2**20
"""Bytes of a tile on a CPU: the passes over a tile find it in a core's own cache (measured)."""


ACCELERATOR_TILE = 64 * 2**20
"""Bytes of a tile on a GPU or TPU: large, so that launching kernels costs little."""


class Backend(Generic[ArrayT]):
    """The verbs of one array library. An adapter overrides only what differs.

    >>> Backend().to_array([1, 2])
    array([1, 2])
    """

    name = "numpy"
    slices_copy = False  # whether `slice_rows` copies, so that a tile of rows takes memory too
    has_devices = False  # whether arrays have a `.device`, and only the user moves them

    def __init__(self, xp: Any = numpy_namespace) -> None:
        self.xp = namespace(xp=xp)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Backend[ArrayT]":
        return self  # stateless, and modules cannot be copied

    def to_array(self, value: Any) -> ArrayT:
        """Return `value` as an array of this library; its own arrays are returned unchanged."""
        return self.xp.asarray(value)

    def to_host(self, array: ArrayT) -> np.ndarray[Any, Any]:
        """Return the values as a NumPy array; bfloat16 as ml_dtypes.bfloat16."""
        return np.asarray(array)

    def from_host(self, table: ArrayT, values: np.ndarray[Any, Any]) -> ArrayT:
        """Replace a table's values with what any library's `to_host` returned; like `overwrite`."""
        return self.overwrite(table, self.to_array(values))

    def generator_state(self, generator: Any) -> tuple[str, Any]:
        """Return a noise generator's kind, and its whole state in a form that JSON can hold."""
        state = generator.bit_generator.state
        return state["bit_generator"], state

    def set_generator_state(self, generator: Any, state: Any) -> None:
        """Set a generator to a state that `generator_state` returned for one of its kind."""
        generator.bit_generator.state = state

    def owns(self, value: Any) -> bool:
        """Return whether `value` is an array of this library."""
        return hasattr(value, "shape") and hasattr(value, "dtype")

    def truth(self, value: ArrayT) -> bool | None:
        """Return a bool scalar's value; None if it is unknown while tracing."""
        return bool(value)

    def tile_rows(self, queries: ArrayT) -> int | None:
        """Return the number of queries to size tiles for; None if it is unknown while tracing."""
        rows: int | None = queries.shape[0]
        return rows

    def tile_bytes(self, array: ArrayT) -> int:
        """Return the memory for a tile on the device of `array`, if the user sets none."""
        return CPU_TILE

    def stop_gradient(self, array: ArrayT) -> ArrayT:
        """Return the same values as a constant for differentiation."""
        return array

    def no_gradient(self) -> contextlib.AbstractContextManager[Any]:
        """Return a context for constants: nothing is recorded for differentiation.

        In it, NumPy does not warn of values that are not finite: they are left out and counted.
        """
        return np.errstate(over="ignore", invalid="ignore")

    def eager(self) -> bool:
        """Return whether operations run when they are called, and are not being traced."""
        return True

    def differentiates(self) -> bool:
        """Return whether gradients are taken here; False if they were switched off."""
        return True

    def watch_gradients(
        self, arrays: Sequence[ArrayT], check: Callable[[Sequence[bool | None]], None]
    ) -> Sequence[ArrayT]:
        """Return the arrays; call `check` with whether a gradient reaches each, if not all.

        It is called at once, or, in a library that transforms functions, on differentiation.
        None means unknown. Nothing is called where nothing is differentiated.
        """
        del check
        return arrays

    def has_graph(self, value: Any) -> bool:
        """Return whether a value depends on a computation that is gone by the next step."""
        del value
        return False

    def begin_step(self) -> None:
        """Raise OptionError where a step must not run, for example where it would run twice."""
        return  # not an empty body: TensorFlow's AutoGraph would warn

    def after(self, arrays: Any) -> contextlib.AbstractContextManager[Any]:
        """Return a context whose writes happen after all `arrays` (nested) have been computed.

        For libraries that reorder operations: if one fails, nothing is written.
        """
        return contextlib.nullcontext()

    def slice_rows(self, array: ArrayT, start: Any, size: int) -> ArrayT:
        """Return rows start … start + size - 1 of `array`; `start` may be a traced integer."""
        return array[start : start + size, ...]

    def fold_tiles(
        self, function: Callable[[Any], tuple[ArrayT, ...]], count: int
    ) -> tuple[ArrayT, ...]:
        """Return function(0), …, function(count - 1), arrays (n, B) each, joined along axis 0.

        At most one tile is in memory at a time.
        """
        return self.scan_tiles(lambda carry, tile: (carry, function(tile)), (), count)[1]

    def scan_tiles(
        self,
        function: Callable[[Any, Any], tuple[tuple[ArrayT, ...], tuple[ArrayT, ...]]],
        carry: tuple[ArrayT, ...],
        count: int,
    ) -> tuple[tuple[ArrayT, ...], tuple[ArrayT, ...]]:
        """Do what `fold_tiles` does, in order, with function(carry, tile) -> (carry, parts).

        Returns the last carry and the joined parts. A library that traces must not unroll the loop.
        """
        found = []
        for tile in range(count):
            carry, parts = function(carry, tile)
            found.append(parts)
        return carry, concat_rows(found, self.xp)

    def map_chunks(
        self, function: Callable[..., ArrayT], arrays: Sequence[ArrayT], size: int
    ) -> ArrayT:
        """Return function(*chunks) for every `size` rows of `arrays` (n, …), joined: (n, …).

        When differentiating, a chunk's activations are not kept but recomputed, with the
        same random numbers. The function is called at least once, even for no rows.
        """
        rows = arrays[0].shape[0]
        parts = [
            (function(*[array[start : min(start + size, rows), ...] for array in arrays]),)
            for start in range(0, max(rows, 1), size)
        ]
        joined: ArrayT = concat_rows(parts, self.xp)[0]
        return joined

    def block_log_sum_exp(self, scores: ArrayT, written: ArrayT, block: int) -> ArrayT:
        """Return the log-sum-exp of every `block` rows of scores (n, B): (n / block, B).

        written: bool (n,); other rows do not count

        May overwrite `scores`: that saves allocations, in libraries that can.
        """
        xp = self.xp
        scores = xp.where(written[:, None], scores, -float("inf"))
        return log_sum_exp(xp.reshape(scores, (scores.shape[0] // block, block, -1)), 1, xp=xp)

    def read_blocks(
        self,
        scores: ArrayT,
        rows: ArrayT,
        written: ArrayT,
        block: int,
        factors: ArrayT | None = None,
    ) -> tuple[ArrayT, ArrayT, ArrayT]:
        """Return `block_log_sum_exp`, the log-sum-exp of all rows (B,), and a mean (B, D) of rows.

        scores, written: as there; rows (m, D), m <= n; the mean is under each query's softmax.
                         Rows may be of a smaller dtype than scores.
        factors:         (m,) multiply the rows, or None

        May overwrite `scores`.
        """
        xp, count = self.xp, rows.shape[0]
        counts = written[:count, None]
        # Rows of empty slots may hold anything, even values whose product with 0 is not 0.
        read: Any = read_out(
            xp.where(counts, scores[:count, ...], -float("inf")),
            xp.where(counts, rows, fill((1, 1), 0, rows, xp)),
            None if factors is None else xp.where(counts[:, 0], factors, 0.0),
            product=self.sum_of_rows,
            xp=xp,
        )
        return self.block_log_sum_exp(scores, written, block), *read

    def multiplies_as_stored(self, table: ArrayT) -> bool:
        """Return whether the device has a fast product of rows in half types or int8.

        Where it has one, queries are rounded to the rows' dtype. A table of float32 is never asked
        about.
        """
        return False

    def product_as_stored(self, rows: ArrayT, queries: ArrayT) -> ArrayT:
        """Return rows (n, D) @ queries (B, D).T, both of one half type or int8: (n, B) float32.

        Half types are added up in float32, int8 in int32.
        """
        xp = self.xp
        wide = xp.int32 if rows.dtype == xp.int8 else xp.float32
        product = xp.matmul_transposed(xp.astype(rows, wide), xp.astype(queries, wide))
        found: ArrayT = xp.astype(product, xp.float32)
        return found

    def sum_of_rows(self, weights: ArrayT, rows: ArrayT) -> ArrayT:
        """Return weights (B, n) @ rows (n, D), in the dtype of the weights.

        Rows may be of a smaller dtype, where the device multiplies them as they are stored.
        """
        found: ArrayT = self.xp.matmul(weights, cast(rows, weights.dtype, self.xp))
        return found

    def check_fused(self) -> None:
        """Raise OptionError if there is no kernel for `fused_block_weights`."""
        raise OptionError(
            f"fused=True needs a kernel, which {self.name} has not: leave it out, or use "
            "negcache_torch or negcache_jax on a GPU."
        )

    def fused_block_weights(
        self,
        queries: ArrayT,
        table: ArrayT,
        age: ArrayT,
        *,
        query_scale: ArrayT | None,
        row_scale: ArrayT | None,
        bias: ArrayT | None,
        labels: Labels,
        own: Exclusions | None,
        block: int,
        readout: bool,
    ) -> tuple[ArrayT, tuple[ArrayT, ArrayT] | None]:
        """Return the log-sum-exp of each block's scores, (B, blocks); no score is in memory.

        queries: (B, D) in float32, or of the table's dtype; query_scale: (B,) multiplies them
        table:   (C, D); row_scale: (C,) multiplies its rows; age: (C,)
        bias:    (C,) subtracted from a row's scores after `own` has left rows out by `labels`, (C,)
        readout: whether also to return the log-sum-exp of all scores (B,), and the mean (B, D) of
                 rows under each query's softmax, 0 for no rows; else None
        """
        raise NotImplementedError

    def exclude(self, scores: ArrayT, rows: Labels, own: Exclusions) -> ArrayT:
        """Return scores (n, B), -inf where a row, labels (n,), must not be a query's negative.

        May overwrite `scores`.
        """
        return excluded(scores, rows, own, xp=self.xp)

    def write_rows(self, table: ArrayT, slots: ArrayT, rows: ArrayT) -> ArrayT:
        """Put `rows` (n, …) at `slots` (n,) of `table` (C, …), and return the table.

        In place, except where arrays are immutable: there the result is the new table.
        """
        table[slots] = rows
        return table

    def overwrite(self, table: ArrayT, values: ArrayT) -> ArrayT:
        """Replace all of a table's values, in place if possible, and return it."""
        table[...] = values
        return table

    def make_generator(self, seed: Any) -> Any:
        """Return a noise generator from None, an int, or a generator of the library."""
        try:
            return np.random.default_rng(seed)
        except (TypeError, ValueError) as error:
            raise KindError(
                f"generator is {seed!r}: expected None, an int seed of at least 0, or a "
                "numpy.random.Generator."
            ) from error

    def remember(self, generator: Any) -> Callable[[], Any] | None:
        """Return a function that undoes all draws made after this call.

        None if there is nothing to undo, as while tracing, when nothing has been drawn yet.
        """
        if not isinstance(generator, np.random.Generator):
            return None
        bits = generator.bit_generator
        before = bits.state
        return lambda: setattr(bits, "state", before)

    def uniform(self, generator: Any, shape: tuple[Any, ...], like: ArrayT) -> ArrayT:
        """Draw float64 uniforms in [0, 1) on the device of `like`, and advance the generator."""
        return self.xp.asarray(generator.random(shape))

    def all_gather(self, array: ArrayT, group: Any = None) -> ArrayT:
        """Concatenate `array` (n, …) over the replicas of a group, in the order of their ranks."""
        raise OptionError(
            f"use_cross_replica=True needs a distributed backend, but {self.name!r} runs in one "
            "process: use negcache_torch or negcache_tensorflow, or leave the option off."
        )


class NumpyBackend(Backend):
    """NumPy, the reference: the defaults, with scores overwritten in place."""

    def owns(self, value: Any) -> bool:
        """Return whether it is an array; NumPy scalars are converted to one."""
        return isinstance(value, np.ndarray)

    def block_log_sum_exp(self, scores: Array, written: Array, block: int) -> Array:
        """Do it in place; excluded rows are found and filled."""
        scores = np.require(scores, requirements=("C", "W"))  # a score_transform may return views
        scores[~written] = -np.inf
        with np.errstate(divide="ignore"):  # the logarithm of an empty block's sum
            return block_log_sum_exp_in_place(scores, block, xp=self.xp)

    def read_blocks(
        self, scores: Array, rows: Any, written: Any, block: int, factors: Any = None
    ) -> tuple[Array, Array, Array]:
        """Do it in place."""
        scores = np.require(scores, requirements=("C", "W"))
        if not written.all():
            scores[~written] = -np.inf
            rows = np.where(written[: len(rows), None], rows, 0)
            if factors is not None:
                factors = np.where(written[: len(rows)], factors, 0)
        with np.errstate(divide="ignore"):
            return block_log_sum_exp_in_place(scores, block, rows, factors, xp=self.xp)

    def exclude(self, scores: Array, rows: Labels, own: Exclusions) -> Array:
        """Do it in place."""
        scores = np.require(scores, requirements=("C", "W"))
        return exclude_in_place(scores, rows, own, xp=self.xp)


NUMPY = NumpyBackend()
