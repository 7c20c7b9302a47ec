"""Train docstring search with your own loop on Accelerate; the model is that of trainer_search.py.

    python examples/accelerate_search.py
    python examples/accelerate_search.py --resume runs/accelerate_search/step_200
    torchrun --nproc-per-node 2 examples/accelerate_search.py

Processes keep equal caches, and a checkpoint holds one of them: any number of processes can resume.
"""

import argparse
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from docstring_encoder import DualEncoder, Pairs, parse, report, search_metrics
from docstring_pairs import Data, as_data, mine_pairs
from torch.utils.data import DataLoader
from tqdm import tqdm

OUT = Path(__file__).resolve().parents[1] / "runs" / "accelerate_search"
ACCUMULATE = 2  # batches per optimizer step; each is a step of the cache


class Progress:
    """Batches done and metrics logged; Accelerate saves it because it has a state_dict."""

    def __init__(self) -> None:
        self.batches, self.history = 0, []

    def state_dict(self) -> dict[str, Any]:
        """Return what to save."""
        return vars(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it."""
        vars(self).update(state)


class Run:
    """A model, an optimizer and loaders, prepared by Accelerate, and the progress."""

    def __init__(self, data: Data, options: argparse.Namespace) -> None:
        # A seedable sampler shuffles an epoch the same way after a resume.
        seedable = DataLoaderConfiguration(use_seedable_sampler=True)
        self.accelerator = Accelerator(
            cpu=not torch.cuda.is_available(),  # else processes on CPUs do not find each other
            gradient_accumulation_steps=ACCUMULATE,
            dataloader_config=seedable,
        )
        set_seed(0)
        # The accelerator starts torch.distributed, so create the model after it.
        replicated = self.accelerator.num_processes > 1
        model = DualEncoder(options.width, options.cache_size, replicated=replicated)
        train, held_out = Pairs(data, data.train), Pairs(data, data.held_out)
        self.model, self.optimizer, self.train_loader, self.eval_loader = self.accelerator.prepare(
            model,
            torch.optim.AdamW(model.parameters(), lr=options.learning_rate),
            DataLoader(train, options.batch_size, shuffle=True, drop_last=True),
            DataLoader(held_out, 128),
        )
        self.data, self.options, self.progress = data, options, Progress()
        self.accelerator.register_for_checkpointing(self.progress)
        if options.resume:
            self.accelerator.load_state(str(options.resume))

    def train(self) -> None:
        """Train for up to `options.steps` optimizer steps."""
        options, progress = self.options, self.progress
        if not progress.batches:
            self.log(self.evaluate())
        left = options.steps * ACCUMULATE - progress.batches
        bar = tqdm(total=left, disable=not self.accelerator.is_main_process, unit="batch")
        for batch in islice(self.batches(), left):
            self.model.train()
            with self.accelerator.accumulate(self.model):
                loss = self.model(**batch)["loss"]
                self.accelerator.backward(loss)
                self.optimizer.step()
                self.optimizer.zero_grad()
            progress.batches += 1
            bar.update()
            if progress.batches % (options.log_every * ACCUMULATE) == 0:
                metrics = self.accelerator.unwrap_model(self.model).loss_fn.metrics
                self.log({f"cache/{name}": value.item() for name, value in metrics.items()})
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            if progress.batches % (options.eval_every * ACCUMULATE) == 0:
                self.log(self.evaluate())
            if progress.batches % (options.save_every * ACCUMULATE) == 0:
                folder = options.out / f"step_{progress.batches // ACCUMULATE}"
                self.accelerator.save_state(str(folder))
        bar.close()

    def batches(self) -> Iterator[dict[str, torch.Tensor]]:
        """Yield batches epoch after epoch, starting where the run left off."""
        epoch, done = divmod(self.progress.batches, len(self.train_loader))
        while True:
            self.train_loader.set_epoch(epoch)
            yield from self.accelerator.skip_first_batches(self.train_loader, done)
            epoch, done = epoch + 1, 0

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Return the loss of held-out pairs against the cache, MRR and recall@10."""
        self.model.eval()
        found: list[dict[str, torch.Tensor]] = []
        for batch in self.eval_loader:
            result = {**self.model(**batch), "item_id": batch["item_id"]}
            result["loss"] = result["loss"].repeat(len(batch["item_id"]))
            found.append(self.accelerator.gather_for_metrics(result))
        loss, queries, ids = (
            torch.cat([part[key] for part in found])
            for key in ("loss", "query_embeddings", "item_id")
        )
        model = self.accelerator.unwrap_model(self.model)
        figures = {"loss": loss.mean().item(), **search_metrics(model, self.data, queries, ids)}
        return {f"eval_{name}": value for name, value in figures.items()}

    def log(self, figures: dict[str, float]) -> None:
        """Record figures of this step."""
        self.progress.history.append({"step": self.progress.batches // ACCUMULATE, **figures})


def main(arguments: Sequence[str] | None = None) -> Run:
    """Mine, train, evaluate, plot."""
    options = parse(str(__doc__), OUT, arguments)
    run = Run(as_data(mine_pairs(options.max_pairs)), options)
    run.train()
    if run.accelerator.is_main_process:
        report(run.data, run.progress.history, options.picture)
    return run


if __name__ == "__main__":
    main().accelerator.end_training()
