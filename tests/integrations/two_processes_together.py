"""Run by test_st_together.py on ranks: every option at once, in processes that differ."""

import copy
import itertools
import os
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from negcache_sentence_transformers import loss as module
from test_st_rows import routed, transformer
from test_st_together import TEXTS, batch_of, columns_of, make_loss
from tiny_transformer import BATCH
from torch.nn.parallel import DistributedDataParallel

STEPS = 8


def wrapped(model, find):
    """Return a model as a trainer has it.

    find: whether DistributedDataParallel finds weights without a gradient; None: as where weights
          are in shards, each call waits for all processes
    """
    if find is None:
        model.register_forward_pre_hook(lambda *_: dist.all_reduce(torch.ones(1)))
        return model
    return DistributedDataParallel(model, find_unused_parameters=find, bucket_cap_mb=1e-3)


def stays_fresh(model, find, **options):
    """Train at rate 0 on batches of other sizes, columns, tasks and prompts in each process."""
    rank = dist.get_rank()
    routes = hasattr(model[0], "sub_modules")
    loss = make_loss(model, 60, **options)
    loss.model = wrapped(model, find)
    pick = np.random.default_rng([3, rank])
    for step in range(STEPS):
        columns = batch_of(model, pick, routes=routes, every=find is False, shift=rank)
        loss.dataset_name = ("one", "two")[pick.integers(2)]
        if step % 5 == 4:
            model.eval()
            with torch.no_grad():
                assert torch.isfinite(loss(columns))
            model.train()
            continue
        model.zero_grad()
        value = loss(columns)
        value.backward()
        assert torch.isfinite(value)
        assert loss.metrics["staleness"] < 1e-10, (step, loss.metrics["staleness"])
        if find is not None:
            same_in_all([each.grad for each in model.parameters() if each.requires_grad])
    assert loss.metrics["fill"] > 0.5


def same_in_all(gradients):
    for grad in gradients:
        copies = [None] * dist.get_world_size()
        dist.all_gather_object(copies, grad)
        torch.testing.assert_close(*copies, rtol=0, atol=0)


def gradients_are_those_of_one(model, find, size):
    """A step of both processes has the gradient of one that has both batches."""

    def step(loss, rows):
        model.zero_grad()
        loss.dataset_name = "one"
        loss(columns_of(model, rows)).backward()
        return [each.grad.clone() for each in model.parameters() if each.grad is not None]

    processes, made = module.processes, []
    for count in (processes, lambda: 1):
        module.processes = count
        made.append(make_loss(model, 64, mini_batch_size=size, group_by_dataset=True))
    module.processes = processes
    ours, alone = made
    rows = [tuple(TEXTS[3 * row : 3 * row + 3]) for row in range(2 * BATCH + 1)]
    expected = step(alone, rows)
    ours.model = wrapped(model, find)
    part = rows[:2] if dist.get_rank() == 0 else rows[2:]
    torch.testing.assert_close(step(ours, part), expected, rtol=1e-4, atol=1e-6)


def main():
    # Once the processes are joined, transformers saves in the first one alone.
    folder = Path(sys.argv[1], os.environ["RANK"])
    models = [routed(folder / "routed", prompt=False), transformer(folder / "one", prompt=False)]
    for model in models:
        for name, weights in model.named_parameters():
            weights.requires_grad_(".pooler." not in name)  # no text goes through it
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    for model, find, size in itertools.product(models, (True, False, None), (None, 2)):
        stays_fresh(
            copy.deepcopy(model), find, mini_batch_size=size, group_by_dataset=size is not None
        )
    for find, size in itertools.product((True, False), (None, 2)):
        gradients_are_those_of_one(copy.deepcopy(models[0]), find, size)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
