"""The towers to train: weighted bags of tokens, and their evaluation."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from .task import Questions, Task

WIDTH = 128
SCALE = 20.0
TOWERS = ("separate", "shared", "deep")
HIDDEN = 512


class Bags(NamedTuple):
    """Texts without their padding.

    tokens:  (distinct,) the token numbers that are in any of them
    places:  (all,) for each token of each text in turn, its index in `tokens`
    offsets: (texts,) where in `places` each text begins
    """

    tokens: Tensor
    places: Tensor
    offsets: Tensor


def bags_of(tokens: Tensor, buckets: int) -> Bags:
    """Return the bags of token numbers (texts, words), all below `buckets`, 0 = padding."""
    there = tokens != 0
    every = tokens[there].long()
    place = torch.zeros(buckets, dtype=torch.int64)
    place[every] = 1
    distinct = place.nonzero()[:, 0]
    place[distinct] = torch.arange(len(distinct))
    lengths = there.sum(1)
    return Bags(distinct, place[every], lengths.cumsum(0) - lengths)


class Tower(nn.Module):
    """Maps a text to the normalised sum of its tokens' vectors, each times a learned weight.

    Their gradients are sparse: a batch touches a small share of the tokens, and so does its update.

    deep: whether a residual layer follows the sum; each of its updates moves all embeddings
    """

    def __init__(self, vectors: nn.Parameter, *, deep: bool = False) -> None:
        super().__init__()
        self.vectors = vectors
        self.log_weights = nn.Parameter(torch.zeros(len(vectors), 1))
        layers = [nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH)] if deep else []
        self.layers = nn.Sequential(*layers)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map token numbers (n, words) to embeddings (n, WIDTH) of length 1."""
        return self.embed(bags_of(tokens, len(self.vectors)))

    def embed(self, bags: Bags) -> Tensor:
        """Map bags to their embeddings (n, WIDTH)."""
        vectors = functional.embedding(bags.tokens, self.vectors, sparse=True)
        weights = functional.embedding(bags.tokens, self.log_weights, sparse=True).exp()
        total = functional.embedding_bag(bags.places, weights * vectors, bags.offsets, mode="sum")
        embeddings = functional.normalize(total, dim=1)
        if not len(self.layers):
            return embeddings
        return functional.normalize(embeddings + self.layers(embeddings), dim=1)


class TwoTowers(nn.Module):
    """A tower for queries and one for items.

    towers: "separate", each with its own vectors; "shared", with only its own weights;
            "deep", separate ones with a layer on top
    scale:  the factor on cosines, or "trained": then it starts at 20
    """

    def __init__(self, task: Task, towers: str, scale: float | str = SCALE) -> None:
        super().__init__()
        sizes = (task.query_buckets, task.item_buckets)
        if towers == "shared":
            vectors = [_vectors(max(sizes))] * 2
        else:
            vectors = [_vectors(size) for size in sizes]
        self.queries, self.items = (Tower(each, deep=towers == "deep") for each in vectors)
        trained = scale == "trained"
        self.log_scale = nn.Parameter(
            torch.tensor(math.log(SCALE if trained else float(scale))), requires_grad=trained
        )

    def scale(self) -> Tensor:
        """Return the factor on the cosines."""
        return self.log_scale.exp()

    def tables(self) -> list[nn.Parameter]:
        """Return the parameters whose gradients are sparse, each once."""
        tables = (self.queries, self.items)
        every = [each for tower in tables for each in (tower.vectors, tower.log_weights)]
        return list(dict.fromkeys(every))

    def layers(self) -> list[nn.Parameter]:
        """Return the parameters of the layers after the sums."""
        return [*self.queries.layers.parameters(), *self.items.layers.parameters()]


def _vectors(buckets: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(buckets, WIDTH) * 0.1)


@torch.no_grad()
def evaluate(model: TwoTowers, task: Task) -> dict[str, float]:
    """Return MRR and recall@10 of each split, among all items, by the best correct item."""
    items = torch.cat([model.items(part) for part in torch.from_numpy(task.items).split(4096)])
    found = {}
    for name, questions in (("validation", task.validation), ("test", task.test)):
        rank = _ranks(model, torch.from_numpy(task.queries), questions, items).double()
        found[f"{name} MRR"] = (1 / rank).mean().item()
        found[f"{name} recall@10"] = (rank <= 10).double().mean().item()
    return found


def _ranks(model: TwoTowers, queries: Tensor, questions: Questions, items: Tensor) -> Tensor:
    ranks = []
    tables = (torch.from_numpy(table).long().split(128) for table in questions)
    for rows, answers in zip(*tables, strict=True):
        scores = model.queries(queries[rows]) @ items.T
        best = scores.gather(1, answers).amax(dim=1, keepdim=True)
        wrong = scores.scatter(1, answers, -math.inf)
        ranks.append(1 + (~(wrong < best)).sum(dim=1))  # a tie counts as a miss, as does NaN
    return torch.cat(ranks)
