"""Train the docstring search on several processes, with one cache split into a shard for each.

    torchrun --nproc-per-node 2 examples/sharded_cache.py --steps 500

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
from docstring_model import LEARNING_RATE, SearchModel, evaluate
from docstring_pairs import ITEM_WORDS, as_data, batches, mine_pairs
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm


class Towers(SearchModel):
    """Both towers: DistributedDataParallel allows one forward pass for each backward pass."""

    def forward(self, query_tokens: Tensor, item_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Embed queries, and items: positives and negatives together."""
        return self.embed_queries(query_tokens), self.embed_items({"tokens": item_tokens})


def make_loss(towers: Towers, slots: int) -> negcache.NegativeCacheLoss:
    """Return a loss that holds this process's shard of `slots` slots, on the towers' device."""
    return negcache.NegativeCacheLoss(
        slots,
        features={"tokens": negcache.FieldSpec((ITEM_WORDS,), torch.int32)},
        embedding=towers.vectors[:1].bfloat16(),  # an example: its width, dtype and device count
        scale=towers.scale,
        labels={"id": negcache.FieldSpec((), torch.int64)},
        id_keys=("id",),
        group=dist.group.WORLD,
    )


def train_step(
    towers: DistributedDataParallel,
    loss_fn: negcache.NegativeCacheLoss,
    optimizer: torch.optim.Optimizer,
    query_tokens: Tensor,
    features: dict[str, Tensor],
) -> Tensor:
    """Run one step on this process's part of the batch."""
    with torch.no_grad():  # the draw needs no gradient: the module without its wrapper
        retrieval = loss_fn.retrieve(towers.module.embed_queries(query_tokens), features)
    item_tokens = torch.cat([features["tokens"], retrieval.features["tokens"]])
    query, items = towers(query_tokens, item_tokens)
    positive, negative = items[: len(query)], items[len(query) :]
    result = loss_fn.compute_loss(query, positive, negative, retrieval)
    optimizer.zero_grad()
    result.loss.backward()
    loss_fn.commit(result, positive, features)
    optimizer.step()
    return result.loss.detach()


def state_of(
    towers: nn.Module,
    loss_fn: negcache.NegativeCacheLoss,
    optimizer: torch.optim.Optimizer,
    done: Tensor,
) -> dict[str, Any]:
    """Return everything that a run resumes from, by name; the cache's tables are the live ones."""
    towers_state, optimizer_state = get_state_dict(towers, optimizer)
    return {
        "towers": towers_state,
        "optimizer": optimizer_state,
        "loss": loss_fn.distributed_state_dict(),
        "done": done,
    }


def load(
    folder: Path,
    towers: nn.Module,
    loss_fn: negcache.NegativeCacheLoss,
    optimizer: torch.optim.Optimizer,
    done: Tensor,
) -> None:
    """Resume from a checkpoint, whatever the number of processes that saved it."""
    state = state_of(towers, loss_fn, optimizer, done)
    dcp.load(state, checkpoint_id=folder)  # the cache's tables and `done` in place
    set_state_dict(
        towers,
        optimizer,
        model_state_dict=state["towers"],
        optim_state_dict=state["optimizer"],
    )


def train(options: argparse.Namespace, device: torch.device) -> None:
    """Train, and print what the search finds before and after."""
    torch.manual_seed(0)
    towers = DistributedDataParallel(Towers(options.width, sparse=False).to(device))
    loss_fn = make_loss(towers.module, options.slots)
    optimizer = torch.optim.Adam(towers.parameters(), lr=LEARNING_RATE)
    done = torch.tensor(0)  # steps, by now
    if options.checkpoint and options.checkpoint.exists():
        load(options.checkpoint, towers, loss_fn, optimizer, done)
    data = as_data(mine_pairs(options.max_pairs))
    rank, count = dist.get_rank(), dist.get_world_size()
    before, begun = evaluate(towers.module, data), int(done)
    rows = batches(data.train, begun + options.steps, options.batch * count)[begun:]
    own_rows = rows[:, rank::count]  # each process has its own part of the batch
    for own in tqdm(own_rows, desc="training", unit="step", disable=rank > 0):
        ids = data.item_of[own]
        arrays = data.queries[own], data.items[ids], ids
        query_tokens, tokens, ids = (torch.from_numpy(array).to(device) for array in arrays)
        train_step(towers, loss_fn, optimizer, query_tokens, {"tokens": tokens, "id": ids})
    done += options.steps
    if options.checkpoint:
        dcp.save(state_of(towers, loss_fn, optimizer, done), checkpoint_id=options.checkpoint)

    if rank == 0 and options.picture:  # of this process's shard
        picture = negcache.plot_cache(loss_fn, towers.module.embed_items)
        picture.savefig(options.picture)
    if rank == 0:
        fill, here = loss_fn.metrics["fill"], len(loss_fn.cache.age)
        print("MRR {:.3f}, recall@10 {:.3f} before;".format(*before), end=" ")
        print("MRR {:.3f}, recall@10 {:.3f} after".format(*evaluate(towers.module, data)))
        print(f"{count} processes, {here} slots on this one", end="; ")
        print(f"{fill:.0%} of {options.slots} written", end="")
        print(f"; resumed from step {begun}" if begun else "")


def main() -> None:
    """Set up the processes, and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=16, help="queries of each process")
    parser.add_argument("--slots", type=int, default=4_096, help="of all processes together")
    parser.add_argument("--width", type=int, default=64, help="of the embeddings")
    parser.add_argument("--max-pairs", type=int, default=6_000, help="mine at most this many pairs")
    parser.add_argument("--checkpoint", type=Path, help="folder to resume from and save to")
    parser.add_argument("--picture", type=Path, help="file to draw the first process's shard to")
    options = parser.parse_args()

    gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if gpu else "gloo")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    train(options, device)
    # DistributedDataParallel must be gone by here: as the last owner of the group it would wait for
    # gloo's threads while it holds Python's lock, which these may need.
    gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
