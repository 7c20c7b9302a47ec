"""Save a loss's cache with the trainer's checkpoints, resume from them, and log its metrics."""

import copy
import json
import logging
import secrets
import shutil
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from datasets import DatasetDict
from negcache_torch import EMPTY, CheckpointError, KindError, OptionError
from sentence_transformers import SentenceTransformerTrainer
from torch import nn
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy

from ._datasets import SameDataset
from ._items import ItemRows, Telling
from ._saved import load, save
from .loss import NegativeCacheLoss

logger = logging.getLogger(__name__)
_NOTE = "negcache"  # where trainer_state.json names the folder with a checkpoint's caches
_FOLDER = "negcache-"


def keep_cache(
    trainer: SentenceTransformerTrainer,
    *,
    checkpoint: str | Path | None = None,
    start_empty: bool = False,
) -> SentenceTransformerTrainer:
    """Save the caches of a trainer's losses with its checkpoints; return the trainer.

    trainer:     a SentenceTransformerTrainer whose loss is a NegativeCacheLoss, or a dict or
                 wrapper of some
    checkpoint:  the folder to resume from, if it was moved since it was saved
    start_empty: let a resumed training start with empty caches, if the saved ones are lost or do
                 not fit any more

    `trainer.train(resume_from_checkpoint=…)` then goes on with the caches as they were, on any
    number of processes. A checkpoint holds its cache as a folder `negcache-…`, whose name is in its
    trainer_state.json: another run's cache cannot be taken for it, and a missing one raises
    OptionError. With `load_best_model_at_end`, the best checkpoint's cache comes back with its
    model. A new model from the trainer's `model_init` starts with an empty cache.

    The metrics of the cache are logged with the loss, as `cache_fill`, `cache_effective_negatives`,
    `cache_staleness` and so on, averaged over the steps.

    With a dict of losses on several processes, all of them work on the same data set in a step. A
    loss with `group_by_dataset` is told the data set of each batch.

    Raises KindError for a trainer without such a loss, and OptionError where `group_by_dataset` has
    no DatasetDict to take names from. Resuming raises CheckpointError for a cache that does not
    fit.
    """
    for old in [each for each in trainer.callback_handler.callbacks if isinstance(each, _Keeper)]:
        trainer.remove_callback(old)
        old.unhook()
    keeper = _Keeper(trainer, checkpoint, start_empty=start_empty)
    losses = keeper.losses()
    if not losses:
        raise KindError("the trainer has no NegativeCacheLoss: expected one among its losses.")
    grouped = [name for name, loss in losses.items() if loss.group_by_dataset]
    if grouped:
        _check_names(trainer, grouped)
        keeper.hook("should_dataset_name_column_be_added", _is_dict)
        trainer.train_dataset = trainer.preprocess_dataset(trainer.train_dataset, "train")
        trainer.eval_dataset = trainer.preprocess_dataset(trainer.eval_dataset, "eval")
        keeper.hook("compute_loss", _naming(trainer.compute_loss, losses))
    if any(isinstance(loss.rows, ItemRows) for loss in losses.values()):
        collator = copy.copy(trainer.data_collator)
        if hasattr(collator, "preprocess_fn"):
            collator.preprocess_fn = Telling(collator.preprocess_fn)
            keeper.hook("data_collator", collator)
    if isinstance(trainer.loss, dict):
        sharded = [loss for loss in losses.values() if loss.sharded]
        if sharded:
            choose = trainer.get_multi_dataset_batch_sampler
            count = trainer.accelerator.num_processes
            keeper.hook("get_multi_dataset_batch_sampler", partial(SameDataset, choose, count))
    trainer.add_callback(keeper)
    return trainer


class _Keeper(TrainerCallback):
    """Does what `keep_cache` describes, on the trainer's events; every process has one."""

    def __init__(
        self,
        trainer: SentenceTransformerTrainer,
        checkpoint: str | Path | None,
        *,
        start_empty: bool,
    ) -> None:
        self.trainer, self.checkpoint, self.folder = trainer, checkpoint, ""
        self.start_empty = start_empty
        self.hooked: dict[str, Any] = {}

    def losses(self) -> dict[str, NegativeCacheLoss]:
        """Return the losses that have a cache, by their place in the trainer's; each once."""
        given = self.trainer.loss
        named = given if isinstance(given, dict) else {"loss": given}
        found = {
            module: f"{name}.{place}".rstrip(".")
            for name, each in reversed(named.items())
            if isinstance(each, nn.Module)
            for place, module in each.named_modules()
            if isinstance(module, NegativeCacheLoss)
        }
        return {name: loss for loss, name in reversed(found.items())}

    def hook(self, name: str, function: Any) -> None:
        """Replace a method of this one trainer by a function."""
        self.hooked[name] = vars(self.trainer).get(name)
        setattr(self.trainer, name, function)

    def unhook(self) -> None:
        """Restore the trainer's methods."""
        for name, before in self.hooked.items():
            delattr(self.trainer, name)
            if before is not None:
                setattr(self.trainer, name, before)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Restore the caches if the trainer resumes, and name the folder to save to from now on."""
        del control
        losses, note = self.losses(), state.stateful_callbacks.get(_NOTE)
        if state.global_step > 0 and self.start_empty:
            self._empty("Training continues with empty caches, because of start_empty=True.")
        elif note is not None:
            load(losses, self._find(args, state, note))
        elif state.global_step > 0:
            logger.warning(
                "The checkpoint was saved without a negative cache: the cache starts empty."
            )
        elif self.trainer.model_init is not None:
            self._empty("The trainer's model_init made a new model: its cache starts empty.")
        if args.push_to_hub and args.hub_strategy in {
            HubStrategy.CHECKPOINT,
            HubStrategy.ALL_CHECKPOINTS,
        }:
            logger.warning(
                "Checkpoints are pushed to the hub before the cache is saved into them: to "
                "resume from a pushed one, upload its folder %s… too.",
                _FOLDER,
            )
        (self.folder,) = broadcast_object_list([_FOLDER + secrets.token_hex(8)])
        run = str(Path(args.output_dir).resolve())
        state.stateful_callbacks[_NOTE] = {"folder": self.folder, "run": run}
        for loss in losses.values():
            loss.report = self.trainer.track_loss_components

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Forget logged metrics: otherwise the trainer divides by 0 steps if none follow.

        That happens if all batches between two logs are from data sets with other losses.
        """
        del args, state, control
        if logs is not None and "loss" in logs:
            self.trainer.accum_loss_components["train"].clear()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Save the caches into the checkpoint that the trainer has just written."""
        del control
        if args.save_only_model or state.is_hyper_param_search:
            return  # such checkpoints cannot be resumed; trying to says what is missing
        checkpoint = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        save(self.losses(), checkpoint / self.folder)
        if args.should_save:  # left by another run, whose checkpoint was overwritten
            for old in checkpoint.glob(f"{_FOLDER}*"):
                if old.name != self.folder:
                    shutil.rmtree(old, ignore_errors=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Go back to the best model's caches, and release the losses, which must be kept again."""
        del control
        best = state.best_model_checkpoint if args.load_best_model_at_end else None
        if best is not None and not state.is_hyper_param_search:  # whose models are left unchanged
            self._load_best(Path(best))
        for loss in self.losses().values():
            loss.report = None

    def _load_best(self, checkpoint: Path) -> None:
        try:
            told = json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
            load(self.losses(), checkpoint / told["stateful_callbacks"][_NOTE]["folder"])
        except (OSError, KeyError, CheckpointError) as error:
            logger.warning(
                "The trainer is back at its best model, from %s, but the cache is that of the "
                "last step: none was saved there, or not one that fits (%s). Before training "
                "this model further, call loss.handler.reset().",
                checkpoint,
                error,
            )

    def _empty(self, reason: str) -> None:
        for loss in self.losses().values():
            if (loss.handler.cache.age != EMPTY).any():
                logger.warning(reason)
            loss.handler.reset()

    def _find(self, args: Any, state: Any, note: dict[str, str]) -> Path:
        step = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        given = [] if self.checkpoint is None else [Path(self.checkpoint)]
        checkpoints = [*given, Path(args.output_dir, step), Path(note["run"], step)]
        for checkpoint in checkpoints:
            if (checkpoint / note["folder"] / ".metadata").is_file():  # written last
                return checkpoint / note["folder"]
        raise OptionError(
            f"the trainer resumes at step {state.global_step}, but the cache of that checkpoint, "
            f"{note['folder']}, is in none of {[str(each) for each in checkpoints]}: name the "
            "checkpoint with keep_cache(trainer, checkpoint=…). If the cache is lost, or was "
            "never saved, as with save_only_model, continue with an empty one: "
            "keep_cache(trainer, start_empty=True)."
        )


def _check_names(trainer: SentenceTransformerTrainer, grouped: list[str]) -> None:
    """Raise OptionError unless all data sets have names, and evaluation uses training names."""
    train: Any = trainer.train_dataset
    evaluated: Any = trainer.eval_dataset
    for what, given in (("train_dataset", train), ("eval_dataset", evaluated)):
        if given is not None and not isinstance(given, DatasetDict):
            raise OptionError(
                f"the losses {grouped} have group_by_dataset=True, but {what} is a "
                f"{type(given).__name__}: expected a DatasetDict, whose names tell data sets "
                "apart."
            )
    unknown = [] if train is None or evaluated is None else sorted(set(evaluated) - set(train))
    if unknown:
        raise OptionError(
            f"eval_dataset has {unknown}, which train_dataset lacks: with group_by_dataset=True "
            "no row of the cache would compete there. Give them the names of training data sets."
        )


def _is_dict(dataset: Any, args: Any, loss: Any) -> bool:
    """Say that batches of every dict of data sets name their data set."""
    del args, loss
    return isinstance(dataset, DatasetDict)


def _naming(
    compute_loss: Callable[..., Any], losses: dict[str, NegativeCacheLoss]
) -> Callable[..., Any]:
    """Return a `compute_loss` that tells losses which data set a batch is from."""

    @wraps(compute_loss)
    def named(model: Any, inputs: dict[str, Any], *arguments: Any, **options: Any) -> Any:
        for loss in losses.values():
            loss.dataset_name = inputs.get("dataset_name")
        return compute_loss(model, inputs, *arguments, **options)

    return named
