"""State that goes with a module, and that nothing around the module touches."""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from negcache_core import OptionError

_AS_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class OwnState(nn.Module):
    """A module whose tensors are saved, moved and copied with it, and never cast or broadcast.

    tensors: the state, by name; written in place

    To what wraps a model its buffers are one thing, of which every process has a copy and which may
    be cast or averaged. Rows, ages and generators are none of that. So they are buffers of `held`,
    a module that is no submodule: no model around it finds them. Asked itself, it names them, which
    FSDP does to move them to its device and torch.distributed.checkpoint to save them.
    """

    held: Any

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        held = nn.Module()  # whose buffers torch.compile takes for static, as it does any module's
        for name, tensor in tensors.items():
            held.register_buffer(name, tensor)
        self.__dict__["held"] = held  # nn.Module's own way would make it a submodule

    def reset_parameters(self) -> None:
        """Make all as it was at first; PyTorch's name for it, by which FSDP calls it too."""
        raise NotImplementedError

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """Name the tensors: only to who asks this very module."""
        found: Iterator[tuple[str, Tensor]] = self.held.named_buffers(
            prefix, recurse, remove_duplicate
        )
        return found

    def __getattr__(self, name: str) -> Any:
        return self._own[name] if name in self._own else super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._own:  # torch.func.functional_call swaps tensors so
            setattr(self.held, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def _own(self) -> dict[str, Any]:
        held = self.__dict__.get("held")
        return {} if held is None else held._buffers  # noqa: SLF001 - its own

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow the module to another device; a cast is none of this state's business."""
        del recurse
        kept = True
        for name, tensor in self._own.items():
            kept = kept and _keeps_values(fn, tensor.device)
            self._own[name] = _moved(tensor, fn)
        if not kept:
            self.reset_parameters()
        return self

    def _replicate_for_data_parallel(self) -> Self:
        raise OptionError(
            "a cache is inside torch.nn.DataParallel, which runs copies of the model in threads "
            "and discards what they write: rows and draws would be lost. Use one process for "
            "each device with torch.nn.parallel.DistributedDataParallel, or keep the handler "
            "outside."
        )

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        self.held._save_to_state_dict(destination, prefix, keep_vars)  # noqa: SLF001 - its own

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self.held._load_from_state_dict(*arguments)  # noqa: SLF001 - its own


def _moved(tensor: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Return what `function` makes of a tensor, but in its own dtype, bit for bit.

    Casts are for floating tensors, so it is given the same bits as integers.
    """
    bits = tensor.view(_AS_INTEGERS[tensor.itemsize]) if tensor.is_floating_point() else tensor
    moved = function(bits)
    if moved.dtype != bits.dtype:  # Module.type() casts integers too
        moved = bits.to(moved.device)
    return tensor if moved is bits else moved.view(tensor.dtype)


def _keeps_values(function: Callable[[Tensor], Tensor], device: torch.device) -> bool:
    """Return whether values come along: `to_empty` leaves them behind, and whatever is there."""
    # Zeros and ones, as each dtype has them, that no memory can hold by chance or from before.
    now = [int(digit) for digit in f"{time.perf_counter_ns():064b}"]
    mark = torch.tensor(now, dtype=torch.int8, device=device)
    moved = function(mark)
    if mark.is_meta or moved.is_meta:
        return moved.is_meta
    return torch.equal(moved.to(device, mark.dtype), mark)
