"""Train docstring search with transformers.Trainer: a small BERT, with the cache in the model.

    python examples/trainer_search.py
    python examples/trainer_search.py --resume runs/trainer_search/checkpoint-200
    torchrun --nproc-per-node 2 examples/trainer_search.py

Processes keep equal caches, and a checkpoint holds one of them: any number of processes can resume.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from docstring_encoder import DualEncoder, Pairs, parse, report, search_metrics
from docstring_pairs import Data, as_data, mine_pairs
from transformers import EvalPrediction, Trainer, TrainingArguments, set_seed

OUT = Path(__file__).resolve().parents[1] / "runs" / "trainer_search"


class CacheTrainer(Trainer):
    """A trainer that logs the cache's metrics along with the loss."""

    def log(self, logs: dict[str, float], *arguments: Any) -> None:
        """Add the cache's metrics to those of a training step; all loggers get them."""
        if "loss" in logs:
            metrics = self.model.loss_fn.metrics
            logs |= {f"cache/{name}": value.item() for name, value in metrics.items()}
        super().log(logs, *arguments)


def make_trainer(data: Data, options: argparse.Namespace, **more: Any) -> CacheTrainer:
    """Return the trainer; `more` is passed to TrainingArguments."""
    settings = {
        "per_device_train_batch_size": options.batch_size,
        "per_device_eval_batch_size": 128,
        "learning_rate": options.learning_rate,
        "max_steps": options.steps,
        "logging_steps": options.log_every,
        "eval_strategy": "steps",
        "eval_steps": options.eval_every,
        "eval_on_start": not options.resume,
        "save_steps": options.save_every,
        "use_cpu": not torch.cuda.is_available(),  # else processes on CPUs do not find each other
        "dataloader_pin_memory": torch.cuda.is_available(),
        "label_names": ["item_id"],  # so that evaluation computes the loss and keeps the ids
        "ddp_find_unused_parameters": False,
        "report_to": "none",
        "seed": 0,
    }
    # TrainingArguments starts torch.distributed, so create the model after it.
    arguments = TrainingArguments(str(options.out), **{**settings, **more})
    set_seed(0)
    replicated = arguments.world_size > 1
    model = DualEncoder(options.width, options.cache_size, replicated=replicated)

    def compute_metrics(found: EvalPrediction) -> dict[str, float]:
        queries, ids = (torch.from_numpy(each) for each in (found.predictions, found.label_ids))
        return search_metrics(model, data, queries.to(arguments.device), ids.to(arguments.device))

    return CacheTrainer(
        model,
        arguments,
        train_dataset=Pairs(data, data.train),
        eval_dataset=Pairs(data, data.held_out),
        compute_metrics=compute_metrics,
    )


def main(arguments: Sequence[str] | None = None, **more: Any) -> CacheTrainer:
    """Mine, train, evaluate, plot."""
    options = parse(str(__doc__), OUT, arguments)
    data = as_data(mine_pairs(options.max_pairs))
    trainer = make_trainer(data, options, **more)
    trainer.train(resume_from_checkpoint=str(options.resume) if options.resume else None)
    if trainer.is_world_process_zero():
        report(data, trainer.state.log_history, options.picture)
    return trainer


if __name__ == "__main__":
    main()
    if dist.is_initialized():
        dist.destroy_process_group()
