"""Exchange between the processes of torch.distributed: gloo on CPUs, NCCL on GPUs."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from negcache_core import OptionError
from negcache_core.adapter import Replicas, Route


class ProcessGroup(Replicas[Tensor]):
    """The ranks of a process group; None for all ranks.

    What belongs together is sent together, as bytes: no backend supports every dtype.
    """

    def __init__(self, group: Any = None) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise OptionError(
                "a cache is to be shared between processes, but torch.distributed is not "
                "initialised: call torch.distributed.init_process_group first, or use "
                "CacheClassificationLoss without use_cross_replica in one process."
            )
        self.group = group
        self.rank, self.count = dist.get_rank(group), dist.get_world_size(group)

    def numbers(self, own: Sequence[int], like: Tensor) -> list[tuple[int, ...]]:
        sent = torch.tensor(list(own), device=like.device)
        return [tuple(each.tolist()) for each in self._all_gather(sent)]

    def texts(self, own: str, like: Tensor) -> list[str]:
        letters = torch.tensor(list(own.encode()), dtype=torch.uint8, device=like.device)
        sizes = [size for (size,) in self.numbers([len(letters)], like)]
        (every,) = self.gather([letters], sizes)
        return [bytes(part.tolist()).decode() for part in every.split(sizes)]

    def share_generator(self, generator: Any, like: Tensor) -> None:
        state = generator.state
        (states,) = self.gather([state[None].to(like.device)], (1,) * self.count)
        state.copy_(states[0])

    def gather(self, arrays: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        packed = _pack(arrays)
        padded = packed.new_zeros((max(sizes), packed.shape[1]))
        padded[: len(packed)] = packed
        parts = self._all_gather(padded)
        joined = torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
        return _unpack(joined, arrays)

    def gather_fresh(self, array: Tensor, sizes: Sequence[int]) -> Tensor:
        return _GatherFresh.apply(array, self, sizes)  # type: ignore[no-untyped-call] # PyTorch's

    def parts(self, array: Tensor, sizes: Sequence[int]) -> Tensor:
        own = [sizes[self.rank]] * self.count
        received = self._all_to_all(array.contiguous(), list(sizes), own)
        return received.unflatten(0, (self.count, sizes[self.rank]))

    def serve(self, arrays: Sequence[Tensor], route: Route) -> list[Tensor]:
        out, wanted, order = self._counts(route)
        received = self._all_to_all(_pack(arrays), out, wanted)
        rows = torch.empty_like(received)
        rows[order] = received
        return _unpack(rows, arrays)

    def give_back(self, arrays: Sequence[Tensor], route: Route) -> list[Tensor]:
        out, wanted, order = self._counts(route)
        return _unpack(self._all_to_all(_pack(arrays)[order], wanted, out), arrays)

    def entries(self, owner: Tensor) -> Tensor:
        return torch.nonzero(owner == self.rank)[:, 0]

    def as_shard(self, rows: Tensor, slots: int) -> DTensor:
        """Return this rank's rows of a table of `slots` as that table; no copy."""
        group: Any = dist.group.WORLD if self.group is None else self.group
        mesh = DeviceMesh.from_group(group, rows.device.type)
        shape = torch.Size((slots, *rows.shape[1:]))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(rows, mesh, [Shard(0)], shape=shape, stride=stride)

    def _counts(self, route: Route) -> tuple[list[int], list[int], Tensor]:
        """Return how many rows to send to and get from each rank, and the draws in that order."""
        by_asker = route.owner.split(route.sizes)
        out = torch.stack([(asked == self.rank).sum() for asked in by_asker])
        own = by_asker[self.rank]
        wanted = torch.bincount(own, minlength=self.count)
        out, wanted = torch.stack([out, wanted]).tolist()
        return out, wanted, torch.argsort(own, stable=True)

    def _all_gather(self, array: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(array) for _ in range(self.count)]
        dist.all_gather(parts, array, group=self.group)
        return parts

    def _all_to_all(self, rows: Tensor, out: list[int], expected: list[int]) -> Tensor:
        received = rows.new_empty((sum(expected), *rows.shape[1:]))
        dist.all_to_all_single(received, rows, expected, out, group=self.group)
        return received


class _GatherFresh(torch.autograd.Function):
    """Rows of all ranks; a row's gradient is the sum of its gradients on each of them."""

    @staticmethod
    def forward(context: Any, rows: Tensor, group: ProcessGroup, sizes: Sequence[int]) -> Tensor:
        context.group, context.sizes = group, sizes
        return group.gather([rows], sizes)[0]

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return context.group.parts(gradient, context.sizes).sum(0), None, None


def _pack(arrays: Sequence[Tensor]) -> Tensor:
    """Return the bytes (n, …) of arrays of n rows each, side by side."""
    return torch.cat([_as_bytes(array) for array in arrays], dim=1)


def _as_bytes(array: Tensor) -> Tensor:
    row = array.shape[1:].numel() * array.element_size()
    if not array.numel():
        return torch.empty((len(array), row), dtype=torch.uint8, device=array.device)
    # Flatten first, by strides: one-number columns count as contiguous whatever their stride.
    flat = array.contiguous().as_strided((array.numel(),), (1,))
    return flat.view(torch.uint8).reshape(len(array), row)


def _unpack(packed: Tensor, arrays: Sequence[Tensor]) -> list[Tensor]:
    """Reverse `_pack` for arrays like these, with as many rows as were packed."""
    columns = [array.shape[1:].numel() * array.element_size() for array in arrays]
    return [
        part.clone(memory_format=torch.contiguous_format)
        .view(array.dtype)
        .reshape(len(packed), *array.shape[1:])
        for part, array in zip(packed.split(columns, dim=1), arrays, strict=True)
    ]


def all_gather_rows(array: Tensor, group: Any = None) -> Tensor:
    """Concatenate `array` (n, …) over all ranks, in rank order; n may differ between ranks."""
    replicas = ProcessGroup(group)
    sizes = [size for (size,) in replicas.numbers([len(array)], array)]
    return replicas.gather([array], sizes)[0]
