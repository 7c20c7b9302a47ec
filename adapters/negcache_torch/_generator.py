"""A random generator whose whole state is one tensor."""

from typing import Any

import torch
from torch import Tensor

from negcache_core import KindError, OptionError

from ._state import OwnState

_GAMMA = 0x9E3779B97F4A7C15 - 2**64  # 64-bit constants of the published generator, as int64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64


class BufferGenerator(OwnState):
    """SplitMix64: uniforms that depend on one int64 and nothing else.

    seed: an int; or a torch.Generator, or None for PyTorch's global one, from which a seed is drawn

    A torch.Generator cannot be in a state_dict, follow `.to(device)`, or be traced by
    `torch.compile`. This one is saved, moved and copied with its module, needs no synchronisation,
    and draws the same numbers on every device. Source: Steele, Lea, Flood, "Fast Splittable
    Pseudorandom Number Generators", OOPSLA 2014.

    >>> BufferGenerator(0).uniform((2,), torch.device("cpu"))
    tensor([0.8833, 0.4315], dtype=torch.float64)
    """

    def __init__(self, seed: Any = None) -> None:
        if seed is None or isinstance(seed, torch.Generator):
            device = (
                "cpu" if seed is None else seed.device
            )  # never "meta", where a model may be created
            seed = int(torch.randint(2**62, (), generator=seed, device=device))
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise KindError(
                f"generator is {seed!r}: expected None, an int seed, or a torch.Generator."
            )
        super().__init__({"state": torch.tensor(_signed(seed), dtype=torch.int64)})
        self._seed = _signed(seed)

    def bits(self, count: int, device: torch.device) -> Tensor:
        """Return the next `count` 64-bit outputs as int64, and advance."""
        draw = _split_mix_whole if torch.compiler.is_compiling() else _split_mix
        own: Tensor = self.held.state
        bits, state = draw(own.to(device), count)
        own.copy_(state)
        return bits

    def reset_parameters(self) -> None:
        """Start again from the seed."""
        self.held.state.fill_(self._seed)

    def uniform(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Return uniforms in [0, 1) of 53 bits each."""
        refuse_recomputation()
        count = 1
        for size in shape:
            count = count * size
        # Apple's GPUs have no float64; the draw accepts a float32 uniform that rounds to 1.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        return (_shift_right(self.bits(count, device), 11).to(dtype) * 2.0**-53).reshape(shape)


def refuse_recomputation() -> None:
    """Raise OptionError inside a backward pass, where a checkpoint runs its function again.

    A step that runs again would draw other rows than the loss saw, and commit twice.
    """
    if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:  # noqa: SLF001
        raise OptionError(
            "a step of the cache runs in a backward pass, as it does inside "
            "torch.utils.checkpoint: it would draw other negatives and update the cache a "
            "second time. Checkpoint the towers inside the step, not the step."
        )


def _split_mix(state: Tensor, count: int) -> tuple[Tensor, Tensor]:
    steps = torch.arange(1, count + 1, dtype=torch.int64, device=state.device)
    mixed = state + steps * _GAMMA
    mixed = (mixed ^ _shift_right(mixed, 30)) * _MIX_1
    mixed = (mixed ^ _shift_right(mixed, 27)) * _MIX_2
    return mixed ^ _shift_right(mixed, 31), state + torch.full_like(state, _GAMMA) * count


# One unit to compilers: PyTorch 2.13 would fold the constants to over 64 bits, and fuse the
# advance of the state into a loop that still reads it.
_split_mix_whole = torch.library.custom_op("negcache::split_mix", _split_mix, mutates_args=())


@_split_mix_whole.register_fake
def _(state: Tensor, count: int) -> tuple[Tensor, Tensor]:
    return state.new_empty((count,)), torch.empty_like(state)


def _shift_right(values: Tensor, by: int) -> Tensor:
    """Shift as unsigned: int64 shifts copy the sign bit."""
    return (values >> by) & (2 ** (64 - by) - 1)


def _signed(value: int) -> int:
    return (value + 2**63) % 2**64 - 2**63
