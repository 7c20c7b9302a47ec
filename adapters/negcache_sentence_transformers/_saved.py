"""Save and load the state of losses in a checkpoint's folder; all is checked before loading."""

import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from negcache_torch import CheckpointError
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from .loss import NegativeCacheLoss

logger = logging.getLogger(__name__)
_WINDOW, _AGE = "tables.window.state", "tables.cache_cache.age"
_KEY = re.compile(r"(.*)\.(tables\.[^.]+\.[^.]+|cache_loss\..+)")  # a loss's name, a handler's key

Saved = dict[str, dict[str, Any]]  # by loss, by key of its handler's state


def save(losses: Mapping[str, NegativeCacheLoss], folder: Path) -> None:
    """Write the state of losses; all processes do this together."""
    _exchange(dcp.save, _joined(_state_of(losses)), folder)


def load(losses: Mapping[str, NegativeCacheLoss], folder: Path) -> None:
    """Read into the live state of losses; all processes do this together.

    If no window of ages was saved, all rows compete at first. Losses that were not saved are left
    unchanged, with a warning, if others were saved.

    Raises CheckpointError, before anything is changed, if what was saved does not fit.
    """
    own, saved = _state_of(losses), _saved_in(folder)
    wrong = [line for name in own.keys() & saved for line in _misfits(name, own, saved)]
    if not own.keys() & saved:
        wrong = [f"it is for the losses {sorted(saved)}, but the trainer's are {sorted(own)}"]
    if wrong:
        raise CheckpointError(
            f"the cache saved in {folder} does not fit the trainer's: {'; '.join(wrong)}. Make "
            "the losses with the options that they were saved with, or continue with empty "
            "caches: keep_cache(trainer, start_empty=True)."
        )
    for name in sorted(own.keys() - saved):
        logger.warning(
            "The checkpoint has no cache for the loss %r, which starts with the cache it has.", name
        )
    for name in sorted(saved.keys() - own):
        logger.warning(
            "The checkpoint's cache for the loss %r is ignored: there is no such loss.", name
        )
    wanted = {
        name: {key: value for key, value in state.items() if key in saved[name]}
        for name, state in own.items()
        if name in saved
    }
    _exchange(dcp.load, _joined(wanted), folder)
    for name, state in wanted.items():
        if _WINDOW in own[name].keys() - state:
            _open_window(losses[name])


def _misfits(name: str, own: Saved, saved: Saved) -> Iterator[str]:
    """Yield how one loss's saved state differs from its own."""
    mine, found = own[name], saved[name]
    missing = sorted(mine.keys() - found - {_WINDOW})
    unknown = sorted(found.keys() - mine - {_WINDOW})
    if missing:
        yield f"for {name!r} it lacks {[_field(key) for key in missing]}"
    if unknown:
        yield f"for {name!r} it has {[_field(key) for key in unknown]}, which the loss lacks"
    shared = sorted(mine.keys() & found)
    slots = [each[_AGE].shape[0] for each in (found, mine)] if _AGE in shared else [0, 0]
    if slots[0] != slots[1]:
        yield f"for {name!r} it has cache_size={slots[0]}, but the loss has {slots[1]}"
        return
    for key in shared:
        shapes = [tuple(each[key].shape) for each in (found, mine)]
        dtypes = [each[key].dtype for each in (found, mine)]
        if shapes[0] != shapes[1] or dtypes[0] != dtypes[1]:
            yield (
                f"for {name!r} it has {_field(key)!r} of shape {shapes[0]} and {dtypes[0]}, but "
                f"the loss has {shapes[1]} and {dtypes[1]}"
            )


def _state_of(losses: Mapping[str, NegativeCacheLoss]) -> dict[str, dict[str, Tensor]]:
    """Return the live tables and generators; shards as parts of whole tables."""
    return {
        name: loss.handler.distributed_state_dict() if loss.sharded else loss.handler.state_dict()
        for name, loss in losses.items()
    }


class _Table:
    """Shape and dtype of a saved tensor."""

    def __init__(self, saved: TensorStorageMetadata) -> None:
        self.shape, self.dtype = saved.size, saved.properties.dtype


def _saved_in(folder: Path) -> Saved:
    try:
        tables = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    except Exception as error:  # a truncated file fails in many ways
        raise CheckpointError(f"the cache saved in {folder} cannot be read: {error}") from error
    found: Saved = {}
    for joined, table in tables.items():
        match = _KEY.fullmatch(joined)
        if match is None or not isinstance(table, TensorStorageMetadata):
            raise CheckpointError(f"{folder} has an unknown {joined!r}: no cache was saved there.")
        found.setdefault(match[1], {})[match[2]] = _Table(table)
    return found


def _open_window(loss: NegativeCacheLoss) -> None:
    """Let all rows compete at first, as a handler does when it loads rows without a window."""
    state = loss.handler.state_dict()
    window = state.pop(_WINDOW)
    loss.handler.load_state_dict(state)
    if loss.sharded:  # as wide as the oldest row in any shard needs
        dist.all_reduce(window, dist.ReduceOp.MAX)


def _field(key: str) -> str:
    return key.rpartition(".")[2].removeprefix("field_")


def _joined(states: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{name}.{key}": value for name, each in states.items() for key, value in each.items()}


def _exchange(verb: Any, state: dict[str, Tensor], folder: Path) -> None:
    with warnings.catch_warnings():  # no warning for a single process
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        verb(state, checkpoint_id=folder)
