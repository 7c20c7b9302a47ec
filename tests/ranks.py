"""Ranks of torch.distributed over gloo, forked from a process that has imported what they need."""

import multiprocessing
import os
import runpy
import socket
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Importing these anew in each rank would take most of the time.
PRELOAD = [
    *("negcache_torch", "pytest", "torch.testing"),
    *("torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.fsdp"),
    *("negcache_sentence_transformers", "sentence_transformers", "datasets"),
    *("transformers.trainer", "transformers.models.bert.modeling_bert"),
]
PATIENCE = 600  # seconds, for a program


def start(store, function, *arguments, ranks):
    """Start `function(rank, *arguments)` on every rank; return what the processes are held by."""
    return _fork(_work, str(store), ranks, function, *arguments, ranks=ranks)


def _fork(function, *arguments, ranks):
    multiprocessing.set_forkserver_preload(PRELOAD)
    return mp.start_processes(
        function, args=arguments, nprocs=ranks, join=False, start_method="forkserver"
    )


def run(tmp_path, function, *arguments, ranks):
    """Run `function(rank, *arguments)` on every rank; what one of them raises is raised here."""
    context = start(tmp_path / f"{function.__name__}_{ranks}", function, *arguments, ranks=ranks)
    while not context.join():
        pass


def run_program(program, *arguments, ranks):
    """Run a program on every rank, in the environment that torchrun makes.

    torchrun itself, which one example runs under, would import all libraries anew in each rank.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    words = [str(program), *map(str, arguments)]
    context = _fork(_program, ranks, port, words, ranks=ranks)
    for _ in range(PATIENCE // 10):
        if context.join(timeout=10):
            return
    for process in context.processes:
        process.kill()
    raise TimeoutError(f"{words} took more than {PATIENCE} seconds")


def _program(rank, ranks, port, words):
    os.environ |= {
        **dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)),
        **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(ranks)),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "CUDA_VISIBLE_DEVICES": "",
    }
    torch.set_num_threads(1)
    sys.argv = words
    sys.path.insert(0, str(Path(words[0]).parent))
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as stop:
        if stop.code:
            raise RuntimeError(stop.code) from stop


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
