"""The verbs that PyTorch supplies to the core."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from negcache_core.adapter import ACCELERATOR_TILE, CPU_TILE, Backend
from negcache_core.arrays.exclusion import Exclusions, Labels, exclude_in_place
from negcache_core.arrays.numerics import block_log_sum_exp_in_place

from . import _fused, _namespace
from ._generator import BufferGenerator, refuse_recomputation
from ._replicas import all_gather_rows

HALVES = (torch.float16, torch.bfloat16)

MULTIPLE = 8
"""The int8 product takes widths that are multiples of this."""

LEAST_ROWS = 32
"""It takes more than 16 rows; fewer are padded to these."""


class TorchBackend(Backend[Tensor]):
    """PyTorch on any device; rows are written in place, gradients by autograd."""

    name = "torch"
    has_devices = True

    def to_array(self, value: Any) -> Tensor:
        return value if isinstance(value, Tensor) else torch.as_tensor(value)

    def to_host(self, array: Any) -> np.ndarray[Any, Any]:
        if not isinstance(array, Tensor):
            return np.asarray(array)
        array = array.detach().cpu()
        if array.dtype == torch.bfloat16:  # which NumPy supports only through ml_dtypes
            return array.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return array.numpy()

    def from_host(self, table: Tensor, values: np.ndarray[Any, Any]) -> Tensor:
        if values.dtype == ml_dtypes.bfloat16:
            halves = torch.asarray(values.view(np.int16), device="cpu")
            return table.copy_(halves.view(torch.bfloat16))
        return table.copy_(torch.asarray(values, device="cpu"))

    def generator_state(self, generator: BufferGenerator) -> tuple[str, Any]:
        return "SplitMix64", int(generator.state)

    def set_generator_state(self, generator: BufferGenerator, state: Any) -> None:
        generator.state.fill_(state)

    def owns(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.layout is torch.strided

    def truth(self, value: Tensor) -> bool | None:
        return None if torch.compiler.is_compiling() else bool(value)

    # No Python code around it: a step does this often.
    stop_gradient = staticmethod(torch.Tensor.detach)  # type: ignore[assignment]

    def tile_rows(self, queries: Tensor) -> int | None:
        return None if torch.compiler.is_compiling() else queries.shape[0]

    def tile_bytes(self, array: Tensor) -> int:
        return ACCELERATOR_TILE if array.device.type != "cpu" else CPU_TILE

    def no_gradient(self) -> torch.no_grad:
        return torch.no_grad()

    def eager(self) -> bool:
        return not torch.compiler.is_compiling()

    def differentiates(self) -> bool:
        return torch.is_grad_enabled()

    def watch_gradients(
        self, arrays: Sequence[Tensor], check: Callable[[Sequence[bool | None]], None]
    ) -> Sequence[Tensor]:
        if torch.is_grad_enabled():
            learns: list[bool | None] = []
            for array in arrays:
                learns.append(array.requires_grad)  # noqa: PERF401 - a comprehension is a call
            if True in learns and False in learns:
                check(learns)
        return arrays

    def has_graph(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.grad_fn is not None

    def begin_step(self) -> None:
        refuse_recomputation()

    def slice_rows(self, array: Tensor, start: Any, size: int) -> Tensor:
        if not torch.compiler.is_compiling():
            return array[start : start + size]
        torch._check(start >= 0)  # noqa: SLF001 - documented for unknown sizes, if not public
        torch._check(start + size <= array.shape[0])  # noqa: SLF001
        rows = torch.narrow(array, 0, start, size)  # its size is treated as unknown, like its start
        return rows.as_strided((size, *array.shape[1:]), array.stride())

    def scan_tiles(
        self, function: Callable[..., Any], carry: tuple[Tensor, ...], count: int
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        if count == 1 or not torch.compiler.is_compiling():
            return super().scan_tiles(function, carry, count)
        carry, first = function(carry, 0)
        carried = len(carry)

        def body(tile: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
            carry, parts = function(state[:carried], tile.item())
            stacks = (
                stack.index_copy(0, tile[None].to(stack.device), part[None])
                for stack, part in zip(state[carried:], parts, strict=True)
            )
            return tile + 1, *carry, *stacks

        stacks = tuple(
            torch.cat([part[None], part.new_zeros((count - 1, *part.shape))]) for part in first
        )
        start = torch.ones((), dtype=torch.int64, device="cpu")  # where it is used
        state = torch.while_loop(lambda tile, *_: tile < count, body, (start, *carry, *stacks))[1:]
        return state[:carried], tuple(stack.flatten(0, 1) for stack in state[carried:])

    def map_chunks(
        self, function: Callable[..., Tensor], arrays: Sequence[Tensor], size: int
    ) -> Tensor:
        if torch.is_grad_enabled():
            function = functools.partial(checkpoint, function, use_reentrant=False)
        return super().map_chunks(function, arrays, size)

    def block_log_sum_exp(self, scores: Tensor, written: Tensor, block: int) -> Tensor:
        if _values_are_at_hand(scores):
            # The few excluded rows are found and filled.
            scores = scores.contiguous()  # a score_transform may have returned a view of something
            scores.index_fill_(0, torch.nonzero(~written)[:, 0], -torch.inf)
            return block_log_sum_exp_in_place(scores, block, xp=self.xp)
        scores = torch.where(written[:, None], scores, -torch.inf)
        return torch.logsumexp(scores.view(scores.shape[0] // block, block, -1), 1)

    def read_blocks(
        self,
        scores: Tensor,
        rows: Tensor,
        written: Tensor,
        block: int,
        factors: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if not _values_are_at_hand(scores):
            return super().read_blocks(scores, rows, written, block, factors)
        # Measured: twice as fast as PyTorch's attention kernel plus the blocks' own exponentials.
        scores = scores.contiguous()
        if not written.all():
            scores.index_fill_(0, torch.nonzero(~written)[:, 0], -torch.inf)
            rows = torch.where(written[: len(rows), None], rows, 0.0)
            if factors is not None:
                factors = torch.where(written[: len(rows)], factors, 0.0)
        return block_log_sum_exp_in_place(scores, block, rows, factors, xp=self.xp)

    def multiplies_as_stored(self, table: Tensor) -> bool:
        if table.device.type != "cuda" or torch.version.cuda is None:
            return False
        if table.dtype == torch.int8:
            return table.shape[1] % MULTIPLE == 0
        return table.dtype in HALVES and _namespace.SUMS_HALVES_IN_FLOAT32

    def product_as_stored(self, rows: Tensor, queries: Tensor) -> Tensor:
        if rows.dtype in HALVES:
            return _namespace.product_of_halves(rows, queries.mT)
        # The kernel takes a multiple of 8 queries, which is not 0.
        count, size = rows.shape[0], queries.shape[0]
        if count < LEAST_ROWS:  # padding by nothing would copy the tile
            rows = torch.nn.functional.pad(rows, (0, 0, 0, LEAST_ROWS - count))
        spare = -size % MULTIPLE if size else MULTIPLE
        queries = torch.nn.functional.pad(queries, (0, 0, 0, spare))
        return torch._int_mm(rows, queries.mT)[:count, :size].float()  # noqa: SLF001 - the only int8 product

    def sum_of_rows(self, weights: Tensor, rows: Tensor) -> Tensor:
        if rows.dtype == weights.dtype:
            return _namespace.matmul(weights, rows)
        dtype = torch.bfloat16 if rows.dtype == torch.int8 else rows.dtype  # it holds every code
        return _namespace.product_of_halves(weights.to(dtype), rows.to(dtype))

    def check_fused(self) -> None:
        _fused.check()

    # No body of its own: torch.compile traces what it calls.
    fused_block_weights = staticmethod(_fused.block_weights)

    def exclude(self, scores: Tensor, rows: Labels, own: Exclusions) -> Tensor:
        if _values_are_at_hand(scores):
            return exclude_in_place(scores.contiguous(), rows, own, xp=self.xp)
        return super().exclude(scores, rows, own)

    def write_rows(self, table: Tensor, slots: Tensor, rows: Tensor) -> Tensor:
        if table.dtype in _namespace.UNSIGNED:
            _namespace.signed(table).index_copy_(0, slots, _namespace.signed(rows))
            return table
        return table.index_copy_(0, slots, rows)

    def overwrite(self, table: Tensor, values: Tensor) -> Tensor:
        return table.copy_(values)

    def make_generator(self, seed: Any) -> BufferGenerator:
        return BufferGenerator(seed)

    def remember(self, generator: Any) -> Callable[[], Any] | None:
        if torch.compiler.is_compiling() or not isinstance(generator, BufferGenerator):
            return None
        state = generator.held.state
        before = state.clone()
        return lambda: state.copy_(before)

    def uniform(self, generator: BufferGenerator, shape: tuple[int, ...], like: Tensor) -> Tensor:
        return generator.uniform(shape, like.device)

    def all_gather(self, array: Tensor, group: Any = None) -> Tensor:
        return all_gather_rows(array, group)


def _values_are_at_hand(array: Tensor) -> bool:
    """Return whether reading values is free: on a CPU, and not while tracing."""
    return array.device.type == "cpu" and not torch.compiler.is_compiling()


TORCH = TorchBackend(_namespace)
