"""Save a loss's cache with the trainer's checkpoints, go on from there, and log its metrics."""

import logging
import secrets
import warnings
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from accelerate.utils import broadcast_object_list
from negcache_torch import KindError, OptionError
from sentence_transformers import SentenceTransformerTrainer
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .loss import NegativeCacheLoss

logger = logging.getLogger(__name__)
_NOTE = "negcache"  # where in trainer_state.json a checkpoint says which folder has its caches


def keep_cache(
    trainer: SentenceTransformerTrainer, *, checkpoint: str | Path | None = None
) -> SentenceTransformerTrainer:
    """Keep the caches of a trainer's losses with its checkpoints; return the trainer.

    trainer:    one whose loss is a NegativeCacheLoss, or a dict or a wrapper of some
    checkpoint: the folder to go on from, if it was moved since it was saved

    `trainer.train(resume_from_checkpoint=…)` then goes on with the caches as they were, on any
    number of processes. A cache is saved in its checkpoint as a folder `negcache-…`, whose name
    the checkpoint's trainer_state.json has: so no other run's cache can be taken for it, and
    OptionError is raised where it is missing. The metrics of the cache are logged beside the loss,
    as `cache_fill`, `cache_effective_negatives`, `cache_staleness`, …, averaged over the steps.

    Raises KindError for a trainer without such a loss, and OptionError for a dict of losses in
    several processes.
    """
    callbacks = trainer.callback_handler.callbacks
    for old in [each for each in callbacks if isinstance(each, _CacheKeeper)]:
        trainer.remove_callback(old)
    keeper = _CacheKeeper(trainer, checkpoint)
    losses = keeper.losses()
    if isinstance(trainer.loss, nn.Module | dict) and not losses:  # and no function that makes one
        raise KindError("the trainer has no NegativeCacheLoss: expected one among its losses.")
    if isinstance(trainer.loss, dict) and any(loss.sharded for loss in losses.values()):
        raise OptionError(
            "the trainer has a dict of losses and several processes, which may be at different "
            "datasets in one step, and a cache in shards needs all of them: use one loss for all."
        )
    trainer.add_callback(keeper)
    return trainer


class _CacheKeeper(TrainerCallback):
    """Does what `keep_cache` says, on the trainer's events; every process has one."""

    def __init__(self, trainer: SentenceTransformerTrainer, checkpoint: str | Path | None) -> None:
        self.trainer, self.checkpoint, self.folder = trainer, checkpoint, ""

    def losses(self) -> dict[str, NegativeCacheLoss]:
        """Return the losses that have a cache, by where they are in the trainer's."""
        given = self.trainer.loss
        named = given if isinstance(given, dict) else {"loss": given}
        return {
            f"{name}.{place}".rstrip("."): module
            for name, each in named.items()
            if isinstance(each, nn.Module)
            for place, module in each.named_modules()
            if isinstance(module, NegativeCacheLoss)
        }

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Restore the caches if the trainer resumes, and name the folder to save to from now on."""
        del control
        note = state.stateful_callbacks.get(_NOTE)
        if note is not None:
            _exchange(dcp.load, self._state(), self._find(args, state, note))
        elif state.global_step > 0:
            logger.warning(
                "The checkpoint was saved by a training without a negative cache: it starts empty."
            )
        (self.folder,) = broadcast_object_list([f"negcache-{secrets.token_hex(8)}"])
        run = str(Path(args.output_dir).resolve())
        state.stateful_callbacks[_NOTE] = {"folder": self.folder, "run": run}
        for loss in self.losses().values():
            loss.report = self.trainer.track_loss_components

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Save the caches into the checkpoint that the trainer has just written."""
        del control
        if args.save_only_model or state.is_hyper_param_search:
            return  # such checkpoints are not to go on from; one that is tried says what it lacks
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        _exchange(dcp.save, self._state(), folder / self.folder)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Let go of the losses: another trainer has to keep them anew."""
        del args, state, control
        for loss in self.losses().values():
            loss.report = None

    def _find(self, args: Any, state: Any, note: dict[str, str]) -> Path:
        step = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        given = [] if self.checkpoint is None else [Path(self.checkpoint)]
        checkpoints = [*given, Path(args.output_dir, step), Path(note["run"], step)]
        for checkpoint in checkpoints:
            if (checkpoint / note["folder"] / ".metadata").is_file():  # written last
                return checkpoint / note["folder"]
        raise OptionError(
            f"the trainer resumes at step {state.global_step}, and the cache of that checkpoint, "
            f"{note['folder']}, is in none of {[str(each) for each in checkpoints]}: name the "
            "checkpoint, keep_cache(trainer, checkpoint=…)."
        )

    def _state(self) -> dict[str, Tensor]:
        """Return the live tables and generators by name; shards as parts of whole tables."""
        return {
            f"{name}.{key}": value
            for name, loss in self.losses().items()
            for key, value in (
                loss.handler.distributed_state_dict() if loss.sharded else loss.handler.state_dict()
            ).items()
        }


def _exchange(verb: Any, state: dict[str, Tensor], folder: Path) -> None:
    """Save to a folder or load from it, all processes together."""
    with warnings.catch_warnings():  # one process alone is no reason to warn
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        verb(state, checkpoint_id=folder)
