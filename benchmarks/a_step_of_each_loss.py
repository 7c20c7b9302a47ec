"""Claim: with a transformer the cache costs what its drawn rows cost, and little more.

What one training step takes with each way to find negatives: milliseconds, and MB. The tower is a
transformer of MiniLM's size (6 layers of width 384, 30,522 words), randomly initialised, on texts
of 32 tokens; a step is forward, backward and AdamW. PyTorch, one thread.

    python benchmarks/a_step_of_each_loss.py
    python benchmarks/a_step_of_each_loss.py --quick

Time: processor time of the one thread, as others may use the machine; medians over rounds in which
each way has its turn, and the median of ratios to the first way's step in the same round.

Memory: each way in a process of its own, forked before any has run, after a warm-up: by how much a
step raises the peak of resident memory (see memory_of_a_step_is_flat_in_capacity.py), and what the
way keeps from step to step besides model, gradient and optimizer. Linux only.
"""

import argparse
import ctypes
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import negcache_torch as negcache
import torch
from _harness import interleaved, milliseconds, ratio, save, table
from memory_of_a_batch_is_that_of_a_chunk import SCALE, Tower
from memory_of_a_step_is_flat_in_capacity import MB, resident_rise
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from torch import Tensor
from torch.nn import functional

WORDS, TOKENS, LAYERS, WIDTH = 30_522, 32, 6, 384
IN_BATCH, MINED = "in-batch negatives", "in-batch, and a mined negative each"
MEMORY, CACHE = "plain memory", "negative cache"
CHUNKS, CACHED_LOSS = "in-batch, in_chunks", "CachedMultipleNegativesRankingLoss"

Batch = dict[str, Tensor]
Embed = Callable[[Batch], Tensor]


class Way:
    """One way to train: `step()` is a whole training step, `kept` what it holds between steps.

    pairs: of a batch
    slots: of a memory or cache, else 0
    """

    def __init__(self, name: str, pairs: int, slots: int, chunk: int) -> None:
        torch.manual_seed(0)
        self.name, self.pairs, self.slots, self.chunk = name, pairs, slots, chunk
        self.tower = Tower(LAYERS, WIDTH, TOKENS, WORDS)
        # In place, so that the peak of memory is that of the activations.
        self.optimizer = torch.optim.AdamW(self.tower.parameters(), lr=1e-5, fused=True)
        self.kept = 0
        self.loss_of = {
            IN_BATCH: lambda: self._in_batch(self._embed),
            CHUNKS: lambda: self._in_batch(negcache.in_chunks(self._embed, chunk)),
            MINED: lambda: self._in_batch(self._embed, mined=True),
            MEMORY: self._memory,
            CACHE: self._cache,
            CACHED_LOSS: self._cached_loss,
        }[name]()

    def step(self) -> None:
        """Train on a batch of random texts."""
        self.optimizer.zero_grad(set_to_none=False)
        self.loss_of(_batch(self.pairs), _batch(self.pairs)).backward()
        self.optimizer.step()

    def warm_up(self) -> None:
        """Do what only a first step does, in a small batch."""
        pairs, self.pairs = self.pairs, min(self.pairs, 4)
        self.step()
        self.pairs = pairs

    def _embed(self, features: Batch) -> Tensor:
        embedding: Tensor = self.tower(features)["sentence_embedding"]
        return embedding

    def _in_batch(self, embed: Embed, *, mined: bool = False) -> Callable[..., Tensor]:
        def loss(query: Batch, item: Batch) -> Tensor:
            items = [embed(item), embed(_batch(len(item["input_ids"])))] if mined else [embed(item)]
            return _cross_entropy(embed(query) @ torch.cat(items).T)

        return loss

    def _memory(self) -> Callable[..., Tensor]:
        rows, place = _unit_vectors(self.slots), 0
        self.kept = rows.nbytes

        def loss(query: Batch, item: Batch) -> Tensor:
            nonlocal place
            items = self._embed(item)
            scores = self._embed(query) @ torch.cat([items, rows.clone()]).T
            rows[place : place + len(items)] = items.detach()
            place = (place + len(items)) % self.slots
            return _cross_entropy(scores)

        return loss

    def _cache(self) -> Callable[..., Tensor]:
        # The rows are made up, and would look too stale to compete.
        loss_fn = negcache.NegativeCacheLoss(
            self.slots, _batch(1), WIDTH, SCALE, max_staleness=None, generator=0
        )
        cache = loss_fn.cache
        cache.data["embedding"].copy_(_unit_vectors(self.slots))
        cache.data["input_ids"].copy_(_batch(self.slots)["input_ids"])
        cache.age.zero_()
        self.kept = sum(each.nbytes for each in (cache.age, *cache.data.values()))

        def loss(query: Batch, item: Batch) -> Tensor:
            value: Tensor = loss_fn(self._embed, self._embed(query), self._embed(item), item)
            return value

        return loss

    def _cached_loss(self) -> Callable[..., Tensor]:
        model = SentenceTransformer(modules=[self.tower], device="cpu")
        loss_fn = CachedMultipleNegativesRankingLoss(model, SCALE, mini_batch_size=self.chunk)
        return lambda query, item: loss_fn([query, item], None)


def _batch(rows: int) -> Batch:
    return {"input_ids": torch.randint(WORDS, (rows, TOKENS))}


def _unit_vectors(rows: int) -> Tensor:
    return functional.normalize(torch.randn(rows, WIDTH), dim=1)


def _cross_entropy(cosines: Tensor) -> Tensor:
    return functional.cross_entropy(SCALE * cosines, torch.arange(len(cosines)))


def ways_of(options: argparse.Namespace) -> list[tuple[Any, ...]]:
    """Return the arguments of each `Way`; the first is what the others are compared with."""
    small, large, chunk = options.batch, options.large_batch, options.batch
    holding = [(name, small, slots, chunk) for name in (MEMORY, CACHE) for slots in options.slots]
    chunked = [(name, large, 0, chunk) for name in (IN_BATCH, CHUNKS, CACHED_LOSS)]
    return [(IN_BATCH, small, 0, chunk), (MINED, small, 0, chunk), *holding, *chunked]


def memory(arguments: tuple[Any, ...]) -> dict[str, Any]:
    """Return what a way keeps, and by how much a step raises the peak: once in a process."""
    libc = ctypes.CDLL(None)
    for threshold in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD: large blocks go back at once
        libc.mallopt(threshold, 65_536)
    way = Way(*arguments)
    way.warm_up()
    rise = resident_rise(way.step, times=1)
    return {"kept MB": way.kept / MB, "step MB": None if rise is None else rise / MB}


def memory_apart(arguments: tuple[Any, ...]) -> dict[str, Any]:
    """Run `memory` in a fork of this process."""
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(1, mp_context=fork) as pool:
        return pool.submit(memory, arguments).result()


def times(ways: list[tuple[Any, ...]], rounds: int) -> list[dict[str, float]]:
    """Return milliseconds of each way, and the ratio to the first."""
    made = {str(arguments): Way(*arguments) for arguments in ways}
    for way in made.values():
        way.warm_up()
    steps = {key: way.step for key, way in made.items()}
    found = interleaved(
        steps, rounds=rounds, seconds=float("inf"), clock=time.process_time, warm=True
    )
    base = next(iter(steps))
    return [{"ms": milliseconds(found, key), "ratio": ratio(found, key, base)} for key in steps]


def main() -> None:
    """Measure memory in fresh processes, and time in this one."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", maxsplit=1)[0])
    parser.add_argument("--batch", type=int, default=16, help="pairs, and texts of a chunk")
    parser.add_argument("--large-batch", type=int, default=64)
    parser.add_argument("--slots", type=int, nargs="+", default=[8_192, 65_536])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--parts", nargs="+", choices=("memory", "time"), default=["memory", "time"]
    )
    parser.add_argument("--quick", action="store_true", help="small batches and few rounds")
    options = parser.parse_args()
    if options.quick:
        options.batch, options.large_batch, options.slots, options.rounds = 4, 16, [1_024], 3
    torch.set_num_threads(1)
    begun, ways = os.getloadavg()[0], ways_of(options)
    rows = [{"way": name, "pairs": pairs, "slots": slots} for name, pairs, slots, _ in ways]
    if "memory" in options.parts:
        rows = [row | memory_apart(way) for row, way in zip(rows, ways, strict=True)]
        print(table(rows), flush=True)
    if "time" in options.parts:
        timed = times(ways, options.rounds)
        rows = [row | more for row, more in zip(rows, timed, strict=True)]
        print(table(rows))
    print(f"load {begun:.1f} at the start, {os.getloadavg()[0]:.1f} at the end")
    print("written to", save("a_step_of_each_loss", rows))


if __name__ == "__main__":
    main()
