"""The verbs that PyTorch supplies to the core."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from negcache_core.backend import ACCELERATOR_TILE, CPU_TILE, Backend

from . import _namespace
from ._generator import BufferGenerator
from ._replicas import all_gather_rows


class TorchBackend(Backend):
    """PyTorch on any device; rows are written in place, gradients by autograd."""

    name = "torch"

    def to_array(self, value: Any) -> Tensor:
        return value if isinstance(value, Tensor) else torch.as_tensor(value)

    def truth(self, value: Tensor) -> bool | None:
        return None if torch.compiler.is_compiling() else bool(value)

    def device(self, array: Tensor) -> torch.device:
        return array.device

    def stop_gradient(self, array: Tensor) -> Tensor:
        return array.detach()

    def tile_rows(self, queries: Tensor) -> int | None:
        return None if torch.compiler.is_compiling() else queries.shape[0]

    def tile_bytes(self, array: Tensor) -> int:
        return ACCELERATOR_TILE if array.device.type != "cpu" else CPU_TILE

    def no_gradient(self) -> torch.no_grad:
        return torch.no_grad()

    def slice_rows(self, array: Tensor, start: Any, size: int) -> Tensor:
        if not torch.compiler.is_compiling():
            return array[start : start + size]
        torch._check(start >= 0)  # noqa: SLF001 - documented for unknown sizes, if not public
        torch._check(start + size <= array.shape[0])  # noqa: SLF001
        rows = torch.narrow(array, 0, start, size)  # its size counts as unknown, like its start
        return rows.as_strided((size, *array.shape[1:]), array.stride())

    def fold_tiles(
        self, function: Callable[[Any], tuple[Tensor, ...]], count: int
    ) -> tuple[Tensor, ...]:
        if count == 1 or not torch.compiler.is_compiling():
            return super().fold_tiles(function, count)
        first = function(0)

        def body(tile: Tensor, *stacks: Tensor) -> tuple[Tensor, ...]:
            parts = function(tile.item())
            return tile + 1, *(
                stack.index_copy(0, tile[None].to(stack.device), part[None])
                for stack, part in zip(stacks, parts, strict=True)
            )

        stacks = tuple(
            torch.cat([part[None], part.new_zeros((count - 1, *part.shape))]) for part in first
        )
        start = torch.ones((), dtype=torch.int64)  # on the host, where it is read
        stacks = torch.while_loop(lambda tile, *_: tile < count, body, (start, *stacks))[1:]
        return tuple(stack.flatten(0, 1) for stack in stacks)

    def block_log_sum_exp(self, scores: Tensor, written: Tensor, block: int) -> Tensor:
        if scores.device.type == "cpu" and not torch.compiler.is_compiling():
            return _log_sum_exp_on_cpu(scores, written, block)
        scores = torch.where(written[:, None], scores, -torch.inf)
        return torch.logsumexp(scores.view(scores.shape[0] // block, block, -1), 1)

    def write_rows(self, table: Tensor, slots: Tensor, rows: Tensor) -> Tensor:
        _namespace.signed(table).index_copy_(0, slots, _namespace.signed(rows))
        return table

    def overwrite(self, table: Tensor, values: Tensor) -> Tensor:
        return table.copy_(values)

    def make_generator(self, seed: Any) -> BufferGenerator:
        return BufferGenerator(seed)

    def uniform(self, generator: BufferGenerator, shape: tuple[int, ...], like: Tensor) -> Tensor:
        return generator.uniform(shape, like.device)

    def all_gather(self, array: Tensor) -> Tensor:
        return all_gather_rows(array)


def _log_sum_exp_on_cpu(scores: Tensor, written: Tensor, block: int) -> Tensor:
    """Do it in place, and with rows as wide as vector registers also where there are few queries.

    Reading values costs nothing on a CPU, so the few rows to leave out are found and filled.
    """
    scores = scores.contiguous()  # a score_transform may have returned a view of something
    scores.index_fill_(0, torch.nonzero(~written)[:, 0], -torch.inf)
    blocks, rows = scores.shape[0] // block, scores.shape[1]
    fold = 8 if rows < 64 else 1
    wide, narrow = (blocks, block // fold, fold * rows), (blocks, fold, rows)
    scores, finite = scores.view(wide), torch.finfo(scores.dtype)
    top = scores.amax(1).view(narrow).amax(1, keepdim=True).clamp_(finite.min, finite.max)
    shifts = top.expand(narrow).reshape(blocks, 1, fold * rows)
    total = scores.sub_(shifts).exp_().sum(1).view(narrow).sum(1)
    return total.log_().add_(top[:, 0])


TORCH = TorchBackend(_namespace)
