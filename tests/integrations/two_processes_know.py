"""Run by test_st_loss.py under torchrun: two parts of a batch do what the whole does."""

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


def main():
    # Once the processes are joined, transformers saves in the first one alone.
    model = make_model(Path(sys.argv[1], os.environ["RANK"]), dtype=torch.float64)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    options = {"own_loop": True, "max_staleness": None, "dtype": torch.float64}
    ours = NegativeCacheLoss(model, 64, scale=4.0, generator=0, **options)
    module._processes = lambda: 1
    alone = NegativeCacheLoss(model, 64, scale=4.0, generator=0, **options)
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
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
