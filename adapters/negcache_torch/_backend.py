"""The verbs that PyTorch supplies to the core."""

from typing import Any

import array_api_compat.torch as torch_namespace
import torch
from torch import Tensor

from negcache_core.backend import Backend

from ._generator import BufferGenerator
from ._replicas import all_gather_rows

# PyTorch has no indexed writes for these: the same bits are written through a signed view.
_SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}


class TorchBackend(Backend):
    """PyTorch on any device; rows are written in place, gradients by autograd."""

    name = "torch"

    def to_array(self, value: Any) -> Tensor:
        return value if isinstance(value, Tensor) else torch.as_tensor(value)

    def device(self, array: Tensor) -> torch.device:
        return array.device

    def stop_gradient(self, array: Tensor) -> Tensor:
        return array.detach()

    def no_gradient(self) -> torch.no_grad:
        return torch.no_grad()

    def block_log_sum_exp(self, scores: Tensor, written: Tensor, block: int) -> Tensor:
        # A score_transform may have returned a view of something; a product is ours to overwrite.
        scores = scores.contiguous().masked_fill_(~written[:, None], -torch.inf)
        blocks = scores.view(scores.shape[0] // block, block, scores.shape[1])
        top = blocks.amax(1, keepdim=True)
        top = torch.where(top.abs() < torch.inf, top, 0.0)
        return blocks.sub_(top).exp_().sum(1).log_().add_(top[:, 0])

    def write_rows(self, table: Tensor, slots: Tensor, rows: Tensor) -> Tensor:
        signed = _SIGNED.get(table.dtype, table.dtype)
        table.view(signed).index_copy_(0, slots, rows.view(signed))
        return table

    def overwrite(self, table: Tensor, values: Tensor) -> Tensor:
        return table.copy_(values)

    def make_generator(self, seed: Any) -> BufferGenerator:
        return BufferGenerator(seed)

    def uniform(self, generator: BufferGenerator, shape: tuple[int, ...], like: Tensor) -> Tensor:
        return generator.uniform(shape, like.device)

    def all_gather(self, array: Tensor) -> Tensor:
        return all_gather_rows(array)


TORCH = TorchBackend(torch_namespace)
