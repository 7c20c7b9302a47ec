"""Ranks of torch.distributed over gloo, forked from a process that has imported what they need."""

import multiprocessing
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Importing these anew in each rank would take most of the time.
PRELOAD = [
    *("negcache_torch", "pytest", "torch.testing"),
    *("torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.fsdp"),
]


def start(store, function, *arguments, ranks):
    """Start `function(rank, *arguments)` on every rank; return what the processes are held by."""
    multiprocessing.set_forkserver_preload(PRELOAD)
    return mp.start_processes(
        _work,
        args=(str(store), ranks, function, *arguments),
        nprocs=ranks,
        join=False,
        start_method="forkserver",
    )


def run(tmp_path, function, *arguments, ranks):
    """Run `function(rank, *arguments)` on every rank; what one of them raises is raised here."""
    context = start(tmp_path / f"{function.__name__}_{ranks}", function, *arguments, ranks=ranks)
    while not context.join():
        pass


def _work(rank, store, ranks, function, *arguments):
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=300),
    )
    torch.set_num_threads(1)
    function(rank, *arguments)
    dist.barrier()
    dist.destroy_process_group()
