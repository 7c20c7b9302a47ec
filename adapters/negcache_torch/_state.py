"""State that moves with a module, and that nothing around the module touches."""

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

    Wrappers of a model assume that every process has a copy of its buffers, and that these may be
    cast or averaged. That does not hold for rows, ages and generators. So they are buffers of
    `held`, which is not a submodule, and no model around it finds them. It names them only if asked
    directly, as FSDP does to move them and torch.distributed.checkpoint to save them.
    """

    held: Any

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        held = nn.Module()  # torch.compile treats its buffers as static, like any module's
        for name, tensor in tensors.items():
            held.register_buffer(name, tensor)
        self.__dict__["held"] = held  # nn.Module's own __setattr__ would make it a submodule

    def reset_parameters(self) -> None:
        """Reset everything to its initial state; FSDP calls this by PyTorch's name too."""
        raise NotImplementedError

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """Name the tensors, but only if this module itself is asked."""
        found: Iterator[tuple[str, Tensor]] = self.held.named_buffers(
            prefix, recurse, remove_duplicate
        )
        return found

    def __getattr__(self, name: str) -> Any:
        return self._own[name] if name in self._own else super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._own:  # torch.func.functional_call swaps tensors this way
            setattr(self.held, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def _own(self) -> dict[str, Any]:
        held = self.__dict__.get("held")
        return {} if held is None else held._buffers  # noqa: SLF001 - its own

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow the module to another device; ignore casts."""
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
    """Return function(tensor), but in the tensor's own dtype, bit for bit.

    Casts apply to floating tensors, so pass it the same bits as integers.
    """
    bits = tensor.view(_AS_INTEGERS[tensor.itemsize]) if tensor.is_floating_point() else tensor
    moved = function(bits)
    if moved.dtype != bits.dtype:  # Module.type() casts integers too
        moved = bits.to(moved.device)
    return tensor if moved is bits else moved.view(tensor.dtype)


def _keeps_values(function: Callable[[Tensor], Tensor], device: torch.device) -> bool:
    """Return whether `function` keeps values; `to_empty` does not."""
    # Zeros and ones in each dtype, a pattern that memory cannot hold by chance or from before.
    now = [int(digit) for digit in f"{time.perf_counter_ns():064b}"]
    mark = torch.tensor(now, dtype=torch.int8, device=device)
    moved = function(mark)
    if mark.is_meta or moved.is_meta:
        return moved.is_meta
    return torch.equal(moved.to(device, mark.dtype), mark)
