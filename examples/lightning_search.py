"""Train the docstring search by PyTorch Lightning, with the cache in its logs and checkpoints.

    python examples/lightning_search.py
    python examples/lightning_search.py --devices 2
    python examples/lightning_search.py --resume runs/lightning_search/checkpoints/step=500.ckpt

With several devices each process holds a shard of one cache, and a checkpoint holds all of it, so
training can resume with any number of devices.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning
import negcache_torch as negcache
import numpy as np
import torch
import torch.distributed as dist
from docstring_model import LEARNING_RATE, SearchModel, evaluate
from docstring_pairs import ITEM_WORDS, Data, as_data, batches, mine_pairs
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

OUT = Path(__file__).resolve().parents[1] / "runs" / "lightning_search"
IN_BAR = ("cache/fill", "cache/staleness")  # of the metrics; the loggers get all of them


def make_handler(
    model: SearchModel, cache_size: int, *, shards: bool
) -> negcache.NegativeCacheLoss:
    """Return a loss with a cache of `cache_size` slots: of this process, or of all together."""
    return negcache.NegativeCacheLoss(
        cache_size,
        features={"tokens": negcache.FieldSpec((ITEM_WORDS,), torch.int32)},
        embedding=model.vectors.shape[1],
        scale=model.scale,
        labels={"id": negcache.FieldSpec((), torch.int64)},
        id_keys=("id",),
        group=dist.group.WORLD if shards else None,
    )


class DocstringSearch(lightning.LightningModule):
    """The demo's towers, and the handler: a submodule, so that checkpoints have its state."""

    def __init__(self, cache_size: int, width: int) -> None:
        super().__init__()
        self.save_hyperparameters()  # so that a checkpoint records how it was made
        self.slots = cache_size
        self.model = SearchModel(width, sparse=False)
        self.handler: negcache.CacheLossHandler | None = None

    def setup(self, stage: str) -> None:
        """Refuse strategies that would treat the shards as copies of each other."""
        del stage
        if not isinstance(self.trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            raise TypeError(
                f"{type(self.trainer.strategy).__name__} would lose shards of the cache: expected "
                'one device, or strategy="ddp".'
            )

    def configure_model(self) -> None:
        """Make the handler here: its shards need the processes to have joined each other."""
        if self.handler is not None:
            return
        self.sharded = dist.is_initialized() and dist.get_world_size() > 1
        self.handler = make_handler(self.model, self.slots, shards=self.sharded)

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        """Run one step of the cache; for DistributedDataParallel it is a single forward pass."""
        features = {"tokens": batch["tokens"], "id": batch["id"]}
        loss = self.handler.update_cache_and_compute_loss(
            self.model.embed_items,
            self.model.embed_queries(batch["query"]),
            self.model.embed_items(features),
            features,
        )
        metrics = {f"cache/{name}": value for name, value in self.handler.metrics.items()}
        in_bar = {name: metrics.pop(name) for name in IN_BAR}
        self.log_dict({"loss": loss, **in_bar}, prog_bar=True)
        self.log_dict(metrics)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer; the handler has no parameters of its own."""
        return torch.optim.Adam(self.parameters(), lr=LEARNING_RATE)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Replace the first process's shards by whole tables; every process calls this."""
        for name, table in self._shards().items():
            checkpoint["state_dict"][name] = table.full_tensor()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take this process's shards out of the whole tables."""
        for name, table in self._shards().items():
            whole = checkpoint["state_dict"][name].to(table.device)
            part = distribute_tensor(whole, table.device_mesh, table.placements)
            checkpoint["state_dict"][name] = part.to_local()

    def _shards(self) -> dict[str, DTensor]:
        state = self.handler.distributed_state_dict() if self.sharded else {}
        tables = {name: table for name, table in state.items() if isinstance(table, DTensor)}
        return {f"handler.{name}": table for name, table in tables.items()}


class Batches:
    """The batches of a run. Lightning saves a loader's state, if it has one, to resume there."""

    def __init__(self, data: Data, rows: np.ndarray) -> None:
        self.data, self.rows, self.done = data, rows, 0

    def __len__(self) -> int:
        return len(self.rows)  # known, so that Lightning does not read one batch ahead

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for rows in self.rows[self.done :]:
            self.done += 1
            ids = self.data.item_of[rows]
            arrays = {"query": self.data.queries[rows], "tokens": self.data.items[ids], "id": ids}
            yield {key: torch.from_numpy(array) for key, array in arrays.items()}

    def state_dict(self) -> dict[str, int]:
        """Return how far the run is; the same in all processes."""
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Resume from there."""
        self.done = state["done"]


def train(
    module: DocstringSearch, data: Data, options: argparse.Namespace, **more: Any
) -> lightning.Trainer:
    """Train, from the checkpoint if one is given; `more` goes to the trainer, which it returns."""
    saver = ModelCheckpoint(
        options.out / "checkpoints", "{step}", every_n_train_steps=options.save_every, save_top_k=-1
    )
    trainer = lightning.Trainer(
        accelerator="cpu" if options.devices > 1 and torch.cuda.device_count() < 2 else "auto",
        devices=options.devices,
        strategy="ddp" if options.devices > 1 else "auto",
        max_steps=options.steps,
        log_every_n_steps=options.log_every,
        logger=CSVLogger(options.out, name=None),
        callbacks=[saver],
        enable_model_summary=False,
        **more,
    )
    micro_steps = options.steps * trainer.accumulate_grad_batches
    rows = batches(data.train, micro_steps, options.batch_size)
    # Each process takes its own part of every batch.
    loader = Batches(data, rows[:, trainer.global_rank :: trainer.world_size])
    trainer.fit(module, loader, ckpt_path=options.resume, weights_only=True)
    return trainer


def main(arguments: Sequence[str] | None = None) -> None:
    """Mine, train, and evaluate before and after."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", maxsplit=1)[0])
    parser.add_argument("--steps", type=int, default=1_000)
    parser.add_argument("--batch-size", type=int, default=32, help="of all processes together")
    parser.add_argument("--cache-size", type=int, default=4_096, help="of all processes together")
    parser.add_argument("--width", type=int, default=64, help="of the embeddings")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--max-pairs", type=int, default=6_000, help="mine at most this many pairs")
    parser.add_argument("--save-every", type=int, default=500, help="steps")
    parser.add_argument("--log-every", type=int, default=50, help="steps")
    parser.add_argument("--resume", type=Path, help="a checkpoint to resume from")
    parser.add_argument("--out", type=Path, default=OUT, help="for logs, checkpoints, a picture")
    options = parser.parse_args(arguments)

    lightning.seed_everything(0)
    data = as_data(mine_pairs(options.max_pairs))
    module = DocstringSearch(options.cache_size, options.width)
    before = evaluate(module.model, data)
    trainer = train(module, data, options)
    after = evaluate(module.model, data)
    if trainer.is_global_zero:
        picture = negcache.plot_cache(module.handler, module.model.embed_items)
        picture.savefig(options.out / "cache.svg")
        print(f"{len(data.held_out)} held-out queries among {len(data.items):,} items, before:")
        print("MRR {:.3f}, recall@10 {:.3f}; after:".format(*before))
        print("MRR {:.3f}, recall@10 {:.3f}".format(*after))


if __name__ == "__main__":
    main()
