"""Retrieval over item ids: a table of embeddings, and a cache that keeps one id per slot.

    python examples/item_ids.py
    python examples/item_ids.py --items 1000000 --cache-size 65536 --eval-every 200
    python examples/item_ids.py --items 1000000 --cache-size 65536 --costs

The data is synthetic: an item has a category, a position near the category's centre, and a
popularity (Zipf's law); a query is a noisy observation of the position of the item it asks for. So
the best recall that any model can reach is known. Nothing is downloaded.
"""

import argparse
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import negcache_torch as negcache
import torch
from curves import Panel, draw
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

OUT = Path(__file__).resolve().parents[1] / "runs" / "item_ids"
FEATURES, WIDTH = 16, 32  # of a query, and of an embedding
NOISE = 0.2  # standard deviation of a query's numbers
QUERIES = 1_000  # for evaluation
UPKEEP = 16  # every 16 steps, 1/16 of the cache is replaced and 1/16 refreshed
MOST_EXACT = 100_000  # up to so many items, the softmax over all of them is trained too
EXACT, CORRECTED, PLAIN = "softmax over all items", "cache, corrected", "cache, not corrected"

Optimizers = list[torch.optim.Optimizer]


class Catalogue(NamedTuple):
    """Items 0, 1, 2, …, the most popular first.

    places:   (n, FEATURES), unit vectors; no model sees them
    category: (n,) integers
    share:    (n,) the item's share of all queries
    bounds:   (n,) float64, the cumulative shares
    """

    places: Tensor
    category: Tensor
    share: Tensor
    bounds: Tensor


def make_catalogue(items: int) -> Catalogue:
    """Generate items, 100 per category on average."""
    pick = torch.Generator().manual_seed(0)
    categories = max(2, items // 100)
    category = torch.randint(categories, (items,), generator=pick)
    centres = torch.randn(categories, FEATURES, generator=pick)
    own = torch.randn(items, FEATURES, generator=pick)
    places = functional.normalize(centres[category] + 0.7 * own, dim=1)
    share = 1.0 / (torch.arange(items) + 10.0)
    share /= share.sum()
    return Catalogue(places, category, share, share.double().cumsum(0))


def draw_queries(catalogue: Catalogue, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return queries (count, FEATURES), and the ids (count,) of the items they ask for."""
    pick = torch.Generator().manual_seed(seed)
    where = torch.rand(count, generator=pick, dtype=torch.float64)
    ids = torch.searchsorted(catalogue.bounds, where).clamp(max=len(catalogue.share) - 1)
    noise = torch.randn(count, FEATURES, generator=pick)
    return catalogue.places[ids] + NOISE * noise, ids.int()


class Towers(nn.Module):
    """A two-layer tower for queries, and an item table with a layer on top.

    The item tower takes ids, and looks up the category of each.
    """

    def __init__(self, category: Tensor, *, sparse: bool) -> None:
        super().__init__()
        self.embed_queries = nn.Sequential(nn.Linear(FEATURES, 64), nn.ReLU(), nn.Linear(64, WIDTH))
        self.items = nn.Embedding(len(category), WIDTH, sparse=sparse)
        self.categories = nn.Embedding(int(category.max()) + 1, WIDTH, sparse=sparse)
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("category", category)
        for table in (self.items, self.categories):
            nn.init.normal_(table.weight, std=0.1)

    def embed_items(self, features: dict[str, Tensor]) -> Tensor:
        """Map {"item_id": (n,)} to embeddings (n, WIDTH)."""
        ids = features["item_id"]
        return self.layer(self.items(ids) + self.categories(self.category[ids]))

    def make_optimizers(self, rate: float) -> Optimizers:
        """Return Adam for the layers; for the tables, one that touches only the batch's rows."""
        tables = [self.items.weight, self.categories.weight]
        layers = [*self.embed_queries.parameters(), *self.layer.parameters()]
        if not self.items.sparse:
            return [torch.optim.Adam([*tables, *layers], lr=rate)]
        return [torch.optim.SparseAdam(tables, lr=rate), torch.optim.Adam(layers, lr=rate)]


class Cached:
    """The loss of a batch against the cache, and the cache's upkeep."""

    def __init__(
        self, towers: Towers, catalogue: Catalogue, slots: int, batch: int, *, corrected: bool
    ) -> None:
        item_id = negcache.FieldSpec((), torch.int32)
        self.towers, self.catalogue, self.slots = towers, catalogue, slots
        self.steps, self.rows = 0, slots + batch  # rows that compete
        self.loss_fn = negcache.NegativeCacheLoss(
            slots,
            features={"item_id": item_id},
            embedding=WIDTH,
            scale=1.0,
            labels={"log_count": negcache.FieldSpec((), torch.float32)},
            id_keys=("item_id",),
            log_frequency_key="log_count" if corrected else None,
            use_lru=False,  # drawn rows do not stay longer than others
            generator=0,
        )
        self.pick = torch.Generator().manual_seed(1)
        self.fill(slots)

    def __call__(self, query: Tensor, ids: Tensor) -> Tensor:
        """Return the loss of queries (B, FEATURES) for items (B,)."""
        if self.steps and self.steps % UPKEEP == 0:
            self.fill(self.slots // UPKEEP)
            self.loss_fn.refresh(self.towers.embed_items, self.slots // UPKEEP)
        self.steps += 1
        features = {"item_id": ids}
        return self.loss_fn(
            self.towers.embed_items,
            self.towers.embed_queries(query),
            self.towers.embed_items(features),
            features,
            # A batch's items come in proportion to their share of the queries.
            labels={"log_count": torch.log(self.rows * self.catalogue.share[ids])},
        )

    def fill(self, count: int) -> None:
        """Add items drawn uniformly: otherwise those that nobody asks for never compete."""
        items = len(self.catalogue.share)
        ids = torch.randint(items, (count,), generator=self.pick, dtype=torch.int32)
        log_count = torch.full((count,), math.log(self.rows / items))
        self.loss_fn.prefill(
            self.towers.embed_items, {"item_id": ids}, 8_192, labels={"log_count": log_count}
        )


class Result(NamedTuple):
    """The result of one training run.

    curve:     (step, recall@10, recall@10 of the most popular 1 % of items)
    staleness: of each step; empty without a cache
    ms:        CPU time per step
    """

    curve: list[tuple[int, float, float]]
    staleness: list[float]
    ms: float


def train(method: str, catalogue: Catalogue, options: argparse.Namespace) -> Result:
    """Train by one method; all of them start from the same weights and see the same queries."""
    torch.manual_seed(0)
    exact = method == EXACT
    towers = Towers(catalogue.category, sparse=not exact)
    optimizers = towers.make_optimizers(options.learning_rate)
    loss_of = make_loss(method, towers, catalogue, options)
    curve, staleness, seconds = [(0, *evaluate(towers, catalogue))], [], 0.0
    for step in (bar := tqdm(range(1, options.steps + 1), desc=method, unit="step")):
        batch = draw_queries(catalogue, options.batch_size, seed=step)
        start = time.process_time()
        train_step(loss_of, optimizers, *batch)
        seconds += time.process_time() - start
        if isinstance(loss_of, Cached):
            staleness.append(loss_of.loss_fn.metrics["staleness"].item())
        if step % options.eval_every == 0:
            curve.append((step, *evaluate(towers, catalogue)))
            bar.set_postfix({"recall@10": f"{curve[-1][1]:.3f}"})
    return Result(curve, staleness, 1e3 * seconds / options.steps)


def make_loss(
    method: str, towers: Towers, catalogue: Catalogue, options: argparse.Namespace
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the loss of queries (B, FEATURES) for items (B,)."""
    if method != EXACT:
        sizes = options.cache_size, options.batch_size
        return Cached(towers, catalogue, *sizes, corrected=method == CORRECTED)
    every = {"item_id": torch.arange(len(catalogue.share))}

    def exact(query: Tensor, ids: Tensor) -> Tensor:
        scores = towers.embed_queries(query) @ towers.embed_items(every).T
        return functional.cross_entropy(scores, ids.long())

    return exact


def train_step(
    loss_of: Callable[[Tensor, Tensor], Tensor], optimizers: Optimizers, query: Tensor, ids: Tensor
) -> None:
    """Run one step."""
    loss = loss_of(query, ids)
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()


@torch.no_grad()
def evaluate(towers: Towers | None, catalogue: Catalogue) -> tuple[float, float]:
    """Return recall@10 of new queries, for all and for popular items; for None, the best."""
    given, ids = draw_queries(catalogue, QUERIES, seed=2**40)
    if towers is None:  # the posterior of a normal distribution, with the shares as prior
        queries, items = given / NOISE**2, catalogue.places
        bias = catalogue.share.log()
    else:
        everything = torch.arange(len(catalogue.share)).split(65_536)
        queries = towers.embed_queries(given)
        items = torch.cat([towers.embed_items({"item_id": part}) for part in everything])
        bias = items.new_zeros(())
    hits = []
    for part, own in zip(queries.split(50), ids.long().split(50), strict=True):
        scores = part @ items.T + bias
        hits.append((scores >= scores.gather(1, own[:, None])).sum(dim=1) <= 10)
    hit = torch.cat(hits).double()
    return hit.mean().item(), hit[ids < len(items) // 100].mean().item()


def costs(catalogue: Catalogue, options: argparse.Namespace, steps: int = 5) -> None:
    """Print the time of a step and the size of the tables."""
    items = len(catalogue.share)
    print(f"{items:,} items, batches of {options.batch_size}; CPU ms per step:")
    for name, method, sparse, slots in (
        (f"cache of {options.cache_size:,} slots, SparseAdam", CORRECTED, True, options.cache_size),
        (f"cache of {items:,} slots, SparseAdam", CORRECTED, True, items),
        (f"cache of {options.cache_size:,} slots, Adam", CORRECTED, False, options.cache_size),
        ("softmax over all items, Adam", EXACT, False, 0),
    ):
        towers = Towers(catalogue.category, sparse=sparse)
        optimizers = towers.make_optimizers(options.learning_rate)
        sizes = argparse.Namespace(cache_size=slots, batch_size=options.batch_size)
        loss_of = make_loss(method, towers, catalogue, sizes)
        batches = [draw_queries(catalogue, options.batch_size, seed) for seed in range(steps + 1)]
        train_step(loss_of, optimizers, *batches[0])  # makes the optimizers' state
        start = time.process_time()
        for batch in batches[1:]:
            train_step(loss_of, optimizers, *batch)
        ms = 1e3 * (time.process_time() - start) / steps
        moments = sum(
            each.nbytes
            for optimizer in optimizers
            for state in optimizer.state.values()
            for each in state.values()
            if isinstance(each, Tensor) and each.ndim
        )
        gradient = sum(each.nbytes for each in towers.parameters()) if not sparse else 0
        print(f"{name:<44}{ms:8.0f}", end="")
        print(
            f"{sum(each.nbytes for each in towers.parameters()) / 1e6:8.1f} MB of weights,", end=""
        )
        print(f"{moments / 1e6:8.1f} MB of moments,{gradient / 1e6:8.1f} MB of gradients", end="")
        if isinstance(loss_of, Cached):
            cache = loss_of.loss_fn.cache
            size = sum(table.nbytes for table in (cache.age, *cache.data.values()))
            print(f",{size / 1e6:8.1f} MB of cache", end="")
        print()


def picture(results: dict[str, Result], best: tuple[float, float], path: Path) -> None:
    """Plot recall by step, for all queries and for those about popular items."""
    panels = []
    for number, title in enumerate(("recall@10", "recall@10, the most popular 1 % of items")):
        lines = {
            name: ([point[0] for point in each.curve], [point[1 + number] for point in each.curve])
            for name, each in results.items()
        }
        panels.append(Panel(title, lines, levels={"the best there can be": best[number]}))
    draw(panels, path)


def main(arguments: Sequence[str] | None = None) -> dict[str, Result]:
    """Train by each method, compare, plot."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", maxsplit=1)[0])
    parser.add_argument("--items", type=int, default=20_000)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--cache-size", type=int, default=4_096)
    parser.add_argument("--learning-rate", type=float, default=0.01)
    parser.add_argument("--eval-every", type=int, default=50, help="steps")
    parser.add_argument("--costs", action="store_true", help="only time a few steps")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the picture")
    parser.add_argument("--picture", type=Path, help="default: recall.svg in --out")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    catalogue = make_catalogue(options.items)
    if options.costs:
        costs(catalogue, options)
        return {}
    methods = (EXACT, CORRECTED, PLAIN) if options.items <= MOST_EXACT else (CORRECTED, PLAIN)
    results = {method: train(method, catalogue, options) for method in methods}
    best = evaluate(None, catalogue)
    print(f"recall@10 among {options.items:,} items; best possible {best[0]:.3f}")
    for method, result in results.items():
        _, recall, popular = result.curve[-1]
        print(f"{method:<24}{recall:.3f}, popular items {popular:.3f}; {result.ms:.1f} ms per step")
    picture(results, best, options.picture or options.out / "recall.svg")
    return results


if __name__ == "__main__":
    main()
