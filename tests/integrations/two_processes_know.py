"""Run by test_st_loss.py on ranks: two parts of a batch do what the whole does."""

import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from negcache_sentence_transformers import NegativeCacheLoss
from negcache_sentence_transformers import loss as module
from negcache_sentence_transformers._known import NOTHING, RING
from tiny_transformer import make_model, make_texts
from torch.nn.parallel import DistributedDataParallel


def rows_of(loss):
    """Return what the cache knows: id of a text -> its content's and its anchors' ids."""
    cache = loss.handler.cache
    return {
        cache.data["id"][slot].item(): (
            cache.data["text"][slot].item(),
            {cache.data[key][slot].item() for key in RING} - {NOTHING},
        )
        for slot in (cache.age < 100).nonzero()[:, 0].tolist()
    }


def gradients_in_mini_batches(model, make, rows):
    """Return the gradients of a first step of both processes in mini-batches, and of one alone."""

    def step(loss, rows):
        model.zero_grad()
        loss([model.preprocess(list(each)) for each in zip(*rows, strict=True)]).backward()
        return [each.grad for each in model.parameters() if each.grad is not None]

    ours, alone = make(mini_batch_size=2)
    expected = step(alone, rows)
    ours.model = DistributedDataParallel(model, bucket_cap_mb=1e-3, find_unused_parameters=True)
    part = rows[:2] if dist.get_rank() == 0 else rows[2:]
    return step(ours, part), expected


def main():
    # Once the processes are joined, transformers saves in the first one alone.
    model = make_model(Path(sys.argv[1], os.environ["RANK"]), dtype=torch.float64)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    options = {"own_loop": True, "max_staleness": None, "dtype": torch.float64}
    processes = module.processes

    def make(**more):
        """Return a loss of both processes, and one alone."""
        made = []
        for count in (processes, lambda: 1):
            module.processes = count
            made.append(NegativeCacheLoss(model, 64, scale=4.0, generator=0, **options, **more))
        return made

    ours, alone = make()
    pick, texts = np.random.default_rng(0), ["", *make_texts(9)]
    for step in range(12):
        rows = [[texts[pick.integers(0, 5)], *pick.choice(texts, 1 + step % 3)] for _ in range(6)]
        expected = alone([model.preprocess(list(each)) for each in zip(*rows, strict=True)])
        part = rows[:2] if rank == 0 else rows[2:]  # of unequal size
        value = ours([model.preprocess(list(each)) for each in zip(*part, strict=True)]).detach()
        dist.all_reduce(value)
        torch.testing.assert_close(value / 2, expected.detach(), rtol=1e-9, atol=1e-9)
        shards = [None, None]
        dist.all_gather_object(shards, rows_of(ours))
        assert not shards[0].keys() & shards[1].keys(), step
        assert {**shards[0], **shards[1]} == rows_of(alone), step
    found, expected = gradients_in_mini_batches(model, make, rows)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
