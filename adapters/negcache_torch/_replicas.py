"""Exchange between the processes of torch.distributed."""

import torch
import torch.distributed as dist
from torch import Tensor

from negcache_core import OptionError


def all_gather_rows(array: Tensor) -> Tensor:
    """Concatenate `array` (n, …) over all ranks, in rank order; n may differ between ranks."""
    if not (dist.is_available() and dist.is_initialized()):
        raise OptionError(
            "use_cross_replica=True and torch.distributed is not initialised: call "
            "torch.distributed.init_process_group first, or leave the option off in one process."
        )
    count = torch.tensor([array.shape[0]], device=array.device)
    counts = [int(each) for each in _all_gather(count)]
    padded = array.new_zeros((max(counts), *array.shape[1:]))
    padded[: array.shape[0]] = array
    # Sent as bytes: no engine knows every dtype.
    parts = _all_gather(padded.view(torch.uint8))
    return torch.cat(
        [part.view(array.dtype)[:rows] for part, rows in zip(parts, counts, strict=True)]
    )


def _all_gather(array: Tensor) -> list[Tensor]:
    parts = [torch.empty_like(array) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, array)
    return parts
