"""Claim: with a fixed batch and fixed slots per rank, more ranks cost no rank more.

Each rank scores all queries on its own shard: B x C / W x D multiply-adds of W ranks. So

  batch: B of all ranks and slots of each rank are fixed, and C grows with the ranks. A rank's
         scoring stays the same, and what it sends nearly so.
  part:  queries and slots of each rank are fixed. Everything grows with the ranks: B, C, and a
         rank's scoring in proportion to B. The exchange does not cause that; it is for comparison.

It runs processes of one thread each, over gloo, on one machine, so at most as many as it has cores
run at once. "ms" is the median wall time of a step on the slowest rank, and means nothing with more
processes than cores. "CPU ms" is the processor time of one rank, averaged: it excludes waiting, but
includes the effects of shared caches and memory. "counted MB" is the highest sum of PyTorch's
allocations less frees of rank 0 in a step, and "formula MB" is what `negcache.scaling` predicts.
"sent kB" is counted too: bytes to other ranks, the mean over ranks, next to the formula's. Network
cards and GPUs are not measured.

    python benchmarks/cost_per_rank_is_flat_as_ranks_grow.py --slots 65536
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import negcache_torch as negcache
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from _harness import save, table
from _steps_torch import bytes_of_a_step

SAME = ("kept", "estimator", "slots of a rank", "width", "queries", "ranks")
VOCABULARY = 1_000
TILE = 4 * 2**20


class Case:
    """A step on the first ranks, while the others wait."""

    def __init__(self, options: argparse.Namespace, ranks: int, group: Any, kept: str) -> None:
        self.ranks, self.kept, self.options = ranks, kept, options
        self.queries = options.rows if kept == "batch" else options.rows // max(options.ranks)
        self.queries *= 1 if kept == "batch" else ranks
        self.wall: list[float] = []
        self.cpu: list[float] = []
        if dist.get_rank() < ranks:
            self.step = self._step(group)

    def _step(self, group: Any) -> Callable[[], None]:
        slots, width = self.options.slots, self.options.width
        specs = {
            "id": negcache.FieldSpec((), torch.int64),
            "embedding": negcache.FieldSpec((width,), torch.float32),
        }
        handler = negcache.CacheLossHandler(
            negcache.CacheManager(specs, slots * self.ranks),
            negcache.DistributedCacheClassificationLoss(
                "embedding", ("id",), estimator=self.options.estimator, tile_bytes=TILE, group=group
            ),
            embedding_key="embedding",
            data_keys=("id",),
        )
        tower = torch.nn.Embedding(VOCABULARY, width)
        ids = torch.arange(slots) % VOCABULARY
        with torch.no_grad():
            tower.weight /= width**0.5
            handler.cache.data["id"].copy_(ids)
            handler.cache.data["embedding"].copy_(tower(ids))
            handler.cache.age.copy_(torch.arange(slots))
        own = self.queries // self.ranks
        query, features = torch.randn(own, width, requires_grad=True), {"id": ids[:own]}

        def step() -> None:
            tower.zero_grad()
            loss = handler.update_cache_and_compute_loss(
                lambda data: tower(data["id"]), query, tower(features["id"]), features
            )
            loss.backward()

        return step

    def run(self) -> None:
        """Run one step and time it, if this rank takes part."""
        dist.barrier()
        if dist.get_rank() < self.ranks:
            wall, cpu = time.perf_counter(), time.process_time()
            self.step()
            self.wall.append(time.perf_counter() - wall)
            self.cpu.append(time.process_time() - cpu)
        dist.barrier()

    def row(self) -> dict[str, Any]:
        """Return the results, on rank 0; the others send theirs."""
        dist.barrier()
        own = None
        if dist.get_rank() < self.ranks:
            with Sent() as sent:
                self.step()
            own = (statistics.median(self.wall[1:]), statistics.mean(self.cpu[1:]), sent.bytes)
        dist.barrier()
        counted = None
        if dist.get_rank() == 0:
            counted = bytes_of_a_step(self.step)
        elif dist.get_rank() < self.ranks:
            self.step()
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, own)
        wall, cpu, sizes = zip(*every[: self.ranks], strict=True)
        formula = negcache.scaling(
            self.options.slots * self.ranks,
            self.options.width,
            batch_size=self.queries,
            world_size=self.ranks,
            feature_bytes=8,
            estimator=self.options.estimator,
            tile_bytes=TILE,
        )
        return {
            "kept": self.kept,
            "estimator": self.options.estimator,
            "slots of a rank": self.options.slots,
            "width": self.options.width,
            "queries": self.queries,
            "ranks": self.ranks,
            "ms": 1e3 * max(wall),
            "CPU ms": 1e3 * statistics.mean(cpu),
            "sent kB": 1e-3 * statistics.mean(sizes),
            "formula kB": 1e-3 * formula.sent_bytes,
            "counted MB": None if counted is None else 1e-6 * counted,
            "formula MB": 1e-6 * formula.work_bytes,
            "rounds": len(self.wall) - 1,
        }


class Sent:
    """Counts the bytes that this rank sends to others while it is open."""

    def __enter__(self) -> Self:
        self.bytes = 0
        self._exchanges = dist.all_gather, dist.all_to_all_single
        dist.all_gather, dist.all_to_all_single = self._gather, self._route
        return self

    def __exit__(self, *error: object) -> None:
        dist.all_gather, dist.all_to_all_single = self._exchanges

    def _gather(self, parts: Any, array: Any, **more: Any) -> Any:
        self.bytes += (len(parts) - 1) * array.nbytes
        return self._exchanges[0](parts, array, **more)

    def _route(self, received: Any, rows: Any, expected: Any, out: Any, **more: Any) -> Any:
        there = sum(out) - out[dist.get_rank(more["group"])]
        self.bytes += there * rows.shape[1:].numel() * rows.element_size()
        return self._exchanges[1](received, rows, expected, out, **more)


def work(rank: int, store: str, options: argparse.Namespace) -> None:
    """Do the work of one process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    most = max(options.ranks)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=most)
    groups = {ranks: dist.new_group(list(range(ranks))) for ranks in options.ranks}
    cases = [
        Case(options, ranks, group, kept)
        for kept in ("batch", "part")
        for ranks, group in groups.items()
    ]
    for _ in range(options.rounds + 1):  # the first step compares options, and is not counted
        for case in cases:
            case.run()
    rows = [case.row() for case in cases]
    if rank == 0:
        print(table(rows))
        print("written to", save("cost_per_rank_torch", rows, SAME))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", maxsplit=1)[0])
    parser.add_argument("--slots", type=int, default=65_536, help="of each rank")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--rows", type=int, default=128, help="queries of all, on most ranks")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--estimator", default="paper")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        mp.spawn(work, args=(store, options), nprocs=max(options.ranks))


if __name__ == "__main__":
    main()
