"""Train two towers on several processes against one cache that is cut into a shard for each.

    torchrun --nproc-per-node 2 examples/sharded_cache.py --steps 200

On machines with GPUs each process takes its own, over NCCL; otherwise gloo on the CPU. With
--checkpoint, training goes on from there if it exists, on any number of processes.
"""

import argparse
import gc
import os
from pathlib import Path
from typing import Any

import negcache_torch as negcache
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel

WORDS, WIDTH = 1_000, 32


class Towers(nn.Module):
    """Both towers: DistributedDataParallel allows one forward pass for each backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.query_tower, self.item_tower = (nn.EmbeddingBag(WORDS, WIDTH) for _ in range(2))

    def query(self, words: Tensor) -> Tensor:
        """Return embeddings of length 1."""
        return nn.functional.normalize(self.query_tower(words), dim=1)

    def forward(self, query_words: Tensor, item_words: Tensor) -> tuple[Tensor, Tensor]:
        """Embed queries, and items: positives and negatives together."""
        items = nn.functional.normalize(self.item_tower(item_words), dim=1)
        return self.query(query_words), items


def make_handler(slots: int) -> negcache.CacheLossHandler:
    """Return a handler that holds this process's shard of `slots` slots."""
    specs = {
        "words": negcache.FieldSpec((8,), torch.int64),
        "embedding": negcache.FieldSpec((WIDTH,), torch.bfloat16),
    }
    return negcache.CacheLossHandler(
        negcache.CacheManager(specs, cache_size=slots),
        negcache.DistributedCacheClassificationLoss(
            "embedding", ("words",), scale=20.0, estimator="shared", in_batch_negatives=True
        ),
        embedding_key="embedding",
        data_keys=("words",),
    )


def train_step(
    towers: DistributedDataParallel,
    handler: negcache.CacheLossHandler,
    optimizer: torch.optim.Optimizer,
    query_words: Tensor,
    features: dict[str, Tensor],
) -> Tensor:
    """Run one step on this process's part of the batch."""
    with torch.no_grad():  # the draw needs no gradient: the module without its wrapper
        retrieval = handler.retrieve(towers.module.query(query_words), features)
    words = torch.cat([features["words"], retrieval.features["words"]])
    query, items = towers(query_words, words)
    positive, negative = items[: len(query)], items[len(query) :]
    result = handler.compute_loss(query, positive, negative, retrieval)
    optimizer.zero_grad()
    result.loss.backward()
    handler.commit(result, positive, features)
    optimizer.step()
    return result.loss.detach()


def state_of(
    towers: nn.Module, handler: negcache.CacheLossHandler, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Return all that a run goes on from, by name; the handler's tables are the live ones."""
    towers_state, optimizer_state = get_state_dict(towers, optimizer)
    return {
        "towers": towers_state,
        "optimizer": optimizer_state,
        "handler": handler.distributed_state_dict(),
    }


def load(
    folder: Path,
    towers: nn.Module,
    handler: negcache.CacheLossHandler,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Go on from a checkpoint, whatever the number of processes that saved it."""
    state = state_of(towers, handler, optimizer)
    dcp.load(state, checkpoint_id=folder)  # the handler's tables in place
    set_state_dict(
        towers,
        optimizer,
        model_state_dict=state["towers"],
        optim_state_dict=state["optimizer"],
    )


def train(options: argparse.Namespace, device: torch.device) -> None:
    """Train, and say what the loss is."""
    towers = DistributedDataParallel(Towers().to(device))
    handler = make_handler(options.slots).to(device)
    optimizer = torch.optim.Adam(towers.parameters(), lr=0.01)
    resumed = bool(options.checkpoint and options.checkpoint.exists())
    if resumed:
        load(options.checkpoint, towers, handler, optimizer)
    torch.manual_seed(dist.get_rank())  # a process's own data
    losses = []
    for _ in range(options.steps):
        query_words = torch.randint(0, WORDS, (options.batch, 8), device=device)  # your data
        features = {"words": query_words.flip(1)}
        losses.append(train_step(towers, handler, optimizer, query_words, features))
    if options.checkpoint:
        dcp.save(state_of(towers, handler, optimizer), checkpoint_id=options.checkpoint)

    ends = torch.stack([losses[0], losses[-1]])
    dist.all_reduce(ends)
    first, last = (ends / dist.get_world_size()).tolist()
    if dist.get_rank() == 0:
        fill, here = handler.metrics["fill"], len(handler.cache.age)
        print(f"loss {first:.2f} at first, {last:.2f} at last; {fill:.0%} of {options.slots} slots")
        print(f"{dist.get_world_size()} processes, {here} slots on this one", end="")
        print(", went on from a checkpoint" if resumed else "")


def main() -> None:
    """Set up the processes, and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=32, help="queries of each process")
    parser.add_argument("--slots", type=int, default=8_192, help="of all processes together")
    parser.add_argument("--checkpoint", type=Path, help="folder to go on from and to save to")
    options = parser.parse_args()

    gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if gpu else "gloo")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    train(options, device)
    # DistributedDataParallel must be gone by here: as the last to hold the group it would wait for
    # gloo's threads while it holds Python's lock, for which these may wait.
    gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
