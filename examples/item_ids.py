"""Retrieval over item numbers: a table of a million embeddings, and a cache with one integer a slot.

    python examples/item_ids.py
    python examples/item_ids.py --items 1000000 --cache-size 65536
    python examples/item_ids.py --items 1000000 --cache-size 65536 --costs

The data is made up, with a structure that is known: items have a category, a place near its centre,
and a popularity (Zipf's law); a query is a noisy look at the place of the item that it asks for. So
the best recall that any model can have is known too. Nothing is downloaded.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
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
LEARNING_RATE = 0.01
EXACT_ITEMS = 100_000  # the softmax over all items is trained up to so many
QUERIES = 1_000  # to evaluate with


class Catalogue(NamedTuple):
    """Items 0, 1, 2, …: places (n, FEATURES), category (n,), and share (n,) of all queries."""

    places: Tensor
    category: Tensor
    share: Tensor


def make_catalogue(items: int) -> Catalogue:
    """Make up items; the first is the most popular."""
    pick = torch.Generator().manual_seed(0)
    category = torch.randint(max(2, items // 100), (items,), generator=pick)
    centres = torch.randn(int(category.max()) + 1, FEATURES, generator=pick)
    own = torch.randn(items, FEATURES, generator=pick)
    places = functional.normalize(centres[category] + 0.7 * own, dim=1)
    share = 1.0 / (torch.arange(items) + 10.0)
    return Catalogue(places, category, share / share.sum())


def queries(catalogue: Catalogue, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return queries (count, FEATURES), and the items that they ask for."""
    pick = torch.Generator().manual_seed(seed)
    bounds = catalogue.share.double().cumsum(0)
    ids = torch.searchsorted(bounds, torch.rand(count, generator=pick, dtype=torch.float64))
    ids = ids.clamp(max=len(bounds) - 1)
    noise = torch.randn(count, FEATURES, generator=pick)
    return catalogue.places[ids] + NOISE * noise, ids


class Towers(nn.Module):
    """A layer for queries, and a table of items with a layer on it.

    The item tower takes numbers. What else it needs of an item, its category, it looks up itself.
    """

    def __init__(self, category: Tensor, *, sparse: bool = True) -> None:
        super().__init__()
        self.query = nn.Sequential(nn.Linear(FEATURES, 64), nn.ReLU(), nn.Linear(64, WIDTH))
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
