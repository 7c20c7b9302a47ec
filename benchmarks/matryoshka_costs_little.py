"""Claim: with a small transformer as the tower, matryoshka_dims cost at most 1.4 plain steps.

This is for "exact_query". A step at several widths runs against the same step at the full width
only, side by side in one process, round after round, by processor time: once with the transformer,
and once for the loss alone, with embeddings that are looked up. The cache is full, and embeddings
have length 1. The loss alone costs more: its product is that of the plain step, but it computes
exponentials and norms for each width, which matters for narrow embeddings.

    export OMP_NUM_THREADS=1
    python benchmarks/matryoshka_costs_little.py
"""

import argparse
import itertools
import time
from collections.abc import Callable
from typing import Any

import negcache_torch as negcache
import torch
from _harness import milliseconds, ratio, save, table
from torch import Tensor, nn
from torch.nn.functional import normalize

DIMS = {768: (64, 128, 256, 384, 768), 128: (32, 64, 128)}
SLOTS, ROWS = (16_384, 131_072), (16, 64)
TOKENS, VOCABULARY = 16, 1_000
MOST = 1.4
LEAST_ROUNDS = 5


class Transformer(nn.Module):
    """Two layers, 128 wide, and a projection to the embeddings' width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, 128)
        layer = nn.TransformerEncoderLayer(128, 4, 256, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2)
        self.projection = nn.Linear(128, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Embed tokens (B, TOKENS): (B, width)."""
        found: Tensor = self.projection(self.layers(self.words(tokens)).mean(dim=1))
        return found


class LookUp(nn.Module):
    """An embedding for each first token, which costs next to nothing."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Embed tokens (B, TOKENS): (B, width)."""
        found: Tensor = self.words(tokens[:, 0])
        return found


TOWERS: dict[str, Callable[[int], nn.Module]] = {"none": LookUp, "transformer": Transformer}


def step_of(tower: nn.Module, slots: int, width: int, rows: int, **options: Any) -> Any:
    """Return a step, forward and backward, with its own full cache."""
    torch.manual_seed(1)
    tokens = torch.randint(0, VOCABULARY, (rows, TOKENS))
    asked = torch.randint(0, VOCABULARY, (rows, TOKENS))

    def item_network(features: dict[str, Tensor]) -> Tensor:
        return normalize(tower(features["tokens"]), dim=1)

    loss_fn = negcache.NegativeCacheLoss(
        slots, {"tokens": tokens}, width, generator=0, max_staleness=None, **options
    )
    held = {"tokens": torch.randint(0, VOCABULARY, (slots, TOKENS))}
    held["embedding"] = normalize(torch.randn(slots, width), dim=1)
    loss_fn.restore(negcache.NegativeCache(held, torch.arange(slots, dtype=torch.int32)))

    def step() -> None:
        features = {"tokens": tokens}
        query = normalize(tower(asked), dim=1)
        loss_fn(item_network, query, item_network(features), features).backward()

    return step


def measured(runs: dict[str, Callable[[], None]], seconds: float) -> dict[str, list[float]]:
    """Return the processor time of each step, round after round, after a warm-up round."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds or len(times["plain"]) < LEAST_ROUNDS:
        for name, run in runs.items():
            start = time.process_time()
            run()
            times[name].append(time.process_time() - start)
    return times


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=6.0, help="for each row")
    parser.add_argument("--estimators", nargs="+", default=["exact_query", "shared"])
    options = parser.parse_args()
    found = []
    sizes = itertools.product(options.estimators, TOWERS, DIMS, SLOTS, ROWS)
    for estimator, tower, width, slots, rows in sizes:
        torch.manual_seed(0)
        made = TOWERS[tower](width)
        runs = {
            "plain": step_of(made, slots, width, rows, estimator=estimator),
            "matryoshka": step_of(
                made, slots, width, rows, estimator=estimator, matryoshka_dims=DIMS[width]
            ),
        }
        times = measured(runs, options.seconds)
        row = {"estimator": estimator, "tower": tower, "width": width, "slots": slots, "rows": rows}
        row |= {name + " ms": milliseconds(times, name) for name in runs}
        row["ratio"] = ratio(times, "matryoshka", "plain")
        found.append(row)
        print(table(found[-1:]), flush=True)
    same = ("estimator", "tower", "width", "slots", "rows")
    print(table(found), save("matryoshka_costs_little", found, same), sep="\n")
    claimed = [
        row["ratio"]
        for row in found
        if (row["estimator"], row["tower"]) == ("exact_query", "transformer")
    ]
    if claimed and max(claimed) > MOST:
        raise SystemExit(f"a step with a transformer takes {max(claimed):.2f} plain steps")


if __name__ == "__main__":
    main()
