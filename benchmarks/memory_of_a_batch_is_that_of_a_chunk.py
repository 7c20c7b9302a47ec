"""Claim: with in_chunks a step of any batch size needs the activations of one chunk.

A transformer embeds queries, positives and drawn negatives; the cache itself is not measured.
PyTorch, one thread.

    python benchmarks/memory_of_a_batch_is_that_of_a_chunk.py
    python benchmarks/memory_of_a_batch_is_that_of_a_chunk.py --batches 64 512 --width 384

Memory: the rise of the process's peak resident memory over one step, each in a separate process,
after a warm-up on one chunk (see memory_of_a_step_is_flat_in_capacity.py). "loss alone" is a step
with given embeddings: it needs B x B numbers, the scores of a batch and their gradients.

Time: medians over interleaved rounds, as ratios to the plain step, or to the plain loss in the
batch, of the same round. Ways to the same gradient: "chunks" is in_chunks; "two passes" is
GradCache's way: embed without gradients, take the loss's gradient by the embeddings, embed again
and propagate it; sentence-transformers' CachedMultipleNegativesRankingLoss does that for an
in-batch loss.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import negcache_torch as negcache
import torch
from _harness import interleaved, ratio, save, table
from memory_of_a_step_is_flat_in_capacity import ALLOCATOR, MB, resident_rise
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertConfig, BertModel

VOCABULARY, SCALE = 5_000, 20.0
PLAIN, CHUNKS, TWO_PASSES = "step", "step, chunks", "step, two passes"
NO_TOWER = "loss alone"
IN_BATCH, IN_BATCH_CHUNKS = "in batch", "in batch, chunks"
CACHED_LOSS = "CachedMultipleNegativesRankingLoss"


class Tower(nn.Module):
    """A transformer without dropout, and the mean over its tokens, of norm 1."""

    def __init__(self, layers: int, width: int, tokens: int, words: int = VOCABULARY) -> None:
        super().__init__()
        self.encoder = BertModel(
            BertConfig(
                vocab_size=words,
                hidden_size=width,
                num_hidden_layers=layers,
                num_attention_heads=width // 32,
                intermediate_size=4 * width,
                max_position_embeddings=tokens,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            ),
            add_pooling_layer=False,
        )

    def forward(self, features: dict[str, Tensor], **_: Any) -> dict[str, Tensor]:
        """Return the features with their embedding, as sentence-transformers does."""
        hidden = self.encoder(input_ids=features["input_ids"]).last_hidden_state
        return {**features, "sentence_embedding": functional.normalize(hidden.mean(1), dim=1)}


class Problem:
    """A tower, a full cache, and a batch."""

    def __init__(self, options: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.chunk, self.tokens, self.width = options.chunk, options.tokens, options.width
        self.tower = Tower(options.layers, options.width, options.tokens)
        self.loss_fn = negcache.NegativeCacheLoss(
            options.slots, self.batch(1), options.width, SCALE, generator=0
        )
        rows = self.batch(options.slots)
        cache = self.loss_fn.cache
        cache.data["embedding"].copy_(
            functional.normalize(torch.randn(options.slots, options.width), dim=1)
        )
        cache.data["input_ids"].copy_(rows["input_ids"])
        cache.age.zero_()

    def batch(self, rows: int) -> dict[str, Tensor]:
        """Return random texts."""
        return {"input_ids": torch.randint(VOCABULARY, (rows, self.tokens))}

    def embed(self, features: dict[str, Tensor]) -> Tensor:
        """Return embeddings of norm 1."""
        embedding: Tensor = self.tower(features)["sentence_embedding"]
        return embedding

    def ways(self, rows: int) -> dict[str, Callable[[], Any]]:
        """Return each way by name, as a function that leaves a gradient."""
        query, item = self.batch(rows), self.batch(rows)
        chunked = negcache.in_chunks(self.embed, self.chunk)

        def step(embed: Callable[[dict[str, Tensor]], Tensor]) -> None:
            self.tower.zero_grad()
            self.loss_fn(embed, embed(query), embed(item), item).backward()

        def loss_alone() -> None:
            step(
                lambda features: torch.ones(len(features["input_ids"]), self.width).requires_grad_()
            )

        def two_passes() -> None:
            kept: list[tuple[dict[str, Tensor], Tensor]] = []

            def embed(features: dict[str, Tensor]) -> Tensor:
                with torch.no_grad():
                    embedding = torch.cat([self.embed(part) for part in self.cut(features)])
                kept.append((features, embedding.requires_grad_()))
                return embedding

            step(embed)
            for features, embedding in kept:
                assert embedding.grad is not None  # noqa: S101 - the loss's
                parts = embedding.grad.split(self.chunk)
                for part, gradient in zip(self.cut(features), parts, strict=True):
                    self.embed(part).backward(gradient)

        def in_batch(embed: Callable[[dict[str, Tensor]], Tensor]) -> None:
            self.tower.zero_grad()
            scores = SCALE * embed(query) @ embed(item).T
            functional.cross_entropy(scores, torch.arange(rows)).backward()

        return {
            PLAIN: lambda: step(self.embed),
            CHUNKS: lambda: step(chunked),
            TWO_PASSES: two_passes,
            NO_TOWER: loss_alone,
            IN_BATCH: lambda: in_batch(self.embed),
            IN_BATCH_CHUNKS: lambda: in_batch(chunked),
            CACHED_LOSS: self.cached_loss(query, item),
        }

    def cut(self, features: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """Return chunks of features."""
        return [{"input_ids": part} for part in features["input_ids"].split(self.chunk)]

    def cached_loss(self, query: dict[str, Tensor], item: dict[str, Tensor]) -> Callable[[], Any]:
        """Return sentence-transformers' cached loss, on the same tower."""
        from sentence_transformers import SentenceTransformer  # noqa: PLC0415 - slow to import
        from sentence_transformers.sentence_transformer.losses import (  # noqa: PLC0415
            CachedMultipleNegativesRankingLoss,
        )

        model = SentenceTransformer(modules=[self.tower], device="cpu")
        loss = CachedMultipleNegativesRankingLoss(model, SCALE, mini_batch_size=self.chunk)

        def run() -> None:
            self.tower.zero_grad()
            loss([dict(query), dict(item)], None).backward()

        return run


def memory(way: str, rows: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return how much one step raises the peak; call this once per process."""
    torch.set_num_threads(1)
    problem = Problem(options)
    for _ in range(2):
        problem.ways(options.chunk)[way]()
    rise = resident_rise(problem.ways(rows)[way], times=1)
    return {"way": way, "batch": rows, "chunk": options.chunk, "peak MB": (rise or 0) / MB}


def memory_apart(way: str, rows: int) -> dict[str, Any]:
    """Run `memory` in a fresh process."""
    done = subprocess.run(  # noqa: S603 - this script itself
        [sys.executable, __file__, *sys.argv[1:], "--one", way, str(rows)],
        env={**os.environ, **ALLOCATOR},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {**row, "B x B MB": 4 * rows * rows / MB}


def times(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time each way at one batch size, round after round."""
    torch.set_num_threads(1)
    ways = Problem(options).ways(options.time_at)
    del ways[NO_TOWER]
    found = interleaved(ways, rounds=options.rounds, seconds=options.seconds)
    return [
        {
            "way": way,
            "batch": options.time_at,
            "chunk": options.chunk,
            "ms": 1e3 * statistics.median(found[way]),
            "ratio": ratio(found, way, PLAIN if "step" in way else IN_BATCH),
            "load": os.getloadavg()[0],
        }
        for way in ways
    ]


def main() -> None:
    """Measure memory in fresh processes, then time in this one."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", maxsplit=1)[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 256, 1_024, 4_096])
    parser.add_argument("--plain-up-to", type=int, default=1_024, help="it takes gigabytes")
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--slots", type=int, default=16_384)
    parser.add_argument("--time-at", type=int, default=512, help="batch size for the times")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--quick", action="store_true", help="small batches")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.batches, options.time_at, options.rounds = [64, 256], 128, 3
    if options.one:
        print(json.dumps(memory(options.one[0], int(options.one[1]), options)))
        return
    found = []
    for rows in options.batches:
        found += [
            memory_apart(way, rows)
            for way in (CHUNKS, TWO_PASSES, NO_TOWER, PLAIN)
            if way != PLAIN or rows <= options.plain_up_to
        ]
    print(table(found))
    timed = times(options)
    print(table(timed))
    print("written to", save("large_batches", found + timed))


if __name__ == "__main__":
    main()
