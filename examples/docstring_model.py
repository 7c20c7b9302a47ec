"""The demo's search model, its evaluation, and its training by methods that can be compared."""

import math
import re
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import negcache_torch as negcache
import numpy as np
import torch
from docstring_pairs import BUCKETS, PADDING, Data
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

WIDTH = 256
LEARNING_RATE = 3e-3
EVALUATIONS = 10


class Settings(NamedTuple):
    """The settings that all trainings share."""

    steps: int
    batch_size: int
    cache_size: int
    seed: int


class Result(NamedTuple):
    """A finished training.

    curve:     (step, training seconds so far, MRR, recall@10), from step 0 to the last
    seconds:   time in training steps, without evaluation
    memory_mb: peak resident memory of the process, with Python, PyTorch and the data
    cache_mb:  the cache's part of it
    weights:   the model's state_dict as NumPy arrays
    """

    curve: list[tuple[int, float, float, float]]
    seconds: float
    memory_mb: float
    cache_mb: float
    weights: dict[str, np.ndarray]


class SearchModel(nn.Module):
    """Two towers of hashed bags of words, which share their words' vectors.

    An embedding is the normalised, weighted sum of a text's word vectors. Each tower learns its
    own weight for a word: "return" says little in a sentence, and "self" says nothing in code.

    width:  of the embeddings
    sparse: whether gradients are sparse: a batch touches only a few hundred words, and then so does
            its update; not every optimizer accepts such gradients
    """

    def __init__(self, width: int = WIDTH, *, sparse: bool = True) -> None:
        super().__init__()
        self.sparse = sparse
        self.vectors = nn.Parameter(torch.randn(BUCKETS, width) * 0.1)
        self.query_log_weights = nn.Parameter(torch.zeros(BUCKETS, 1))
        self.item_log_weights = nn.Parameter(torch.zeros(BUCKETS, 1))
        self.log_scale = nn.Parameter(torch.tensor(math.log(20.0)))

    def embed_queries(self, tokens: Tensor) -> Tensor:
        """Map token ids (n, words) to embeddings (n, width) of length 1."""
        return self._embed(tokens, self.query_log_weights)

    def embed_items(self, features: dict[str, Tensor]) -> Tensor:
        """Map {"tokens": ids (n, words)}, as a cache stores them, to embeddings (n, width)."""
        return self._embed(features["tokens"], self.item_log_weights)

    def scale(self) -> Tensor:
        """Return the trained factor on the cosines."""
        return self.log_scale.exp()

    def _embed(self, tokens: Tensor, log_weights: Tensor) -> Tensor:
        weights = functional.embedding(tokens, log_weights, sparse=self.sparse)[:, :, 0].exp()
        total = functional.embedding_bag(
            tokens,
            self.vectors,
            mode="sum",
            per_sample_weights=weights,
            padding_idx=PADDING,
            sparse=self.sparse,
        )
        return functional.normalize(total, dim=1)


# Token ids of queries and of their items, and the items' rows -> the loss, and figures to show.
Loss = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, dict[str, float]]]
# Also returns the size of a cache in MB.
MakeLoss = Callable[[SearchModel, Settings, Data], tuple[Loss, float]]


def in_batch_loss(model: SearchModel, settings: Settings, data: Data) -> tuple[Loss, float]:
    """Cross-entropy of each query's item against the batch's other items."""
    del settings, data

    def loss(
        query_tokens: Tensor, item_tokens: Tensor, ids: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        queries = model.embed_queries(query_tokens)
        items = model.embed_items({"tokens": item_tokens})
        scores = model.scale() * queries @ items.T
        # Another query's copy of a query's own item does not count as a negative.
        own = torch.eye(len(ids), dtype=torch.bool)
        scores = scores.masked_fill((ids[:, None] == ids) & ~own, -math.inf)
        value = functional.cross_entropy(scores, torch.arange(len(ids)))
        return value, {"loss": value.item()}

    return loss, 0.0


def cache_loss(
    model: SearchModel,
    settings: Settings,
    data: Data,
    *,
    estimator: str = "auto",
    in_batch_negatives: bool = True,
    max_staleness: float | None = 0.2,
) -> tuple[Loss, float]:
    """Cross-entropy against everything in a negative cache, and the batch's other items."""
    loss_fn = negcache.NegativeCacheLoss(
        settings.cache_size,
        {"tokens": torch.from_numpy(data.items)},
        embedding=WIDTH,
        scale=model.scale,
        labels={"id": torch.from_numpy(data.item_of)},
        id_keys=("id",),  # a query's own item, cached earlier, is not a negative
        estimator=estimator,
        in_batch_negatives=in_batch_negatives,
        max_staleness=max_staleness,
        generator=settings.seed,
    )

    def loss(
        query_tokens: Tensor, item_tokens: Tensor, ids: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        features, queries = {"tokens": item_tokens}, model.embed_queries(query_tokens)
        items = model.embed_items(features)
        value = loss_fn(model.embed_items, queries, items, features, labels={"id": ids})
        metrics = loss_fn.metrics
        return value, {
            "loss": metrics["interpretable_loss"].item(),
            "staleness": metrics["staleness"].item(),
        }

    tables = (loss_fn.cache.age, *loss_fn.cache.data.values())
    return loss, sum(table.nbytes for table in tables) / 1e6


def train(name: str, make_loss: MakeLoss, settings: Settings, data: Data) -> Result:
    """Train a model with a loss; all losses get the same initial weights and the same batches."""
    # The steps are small: more threads barely help on an idle machine, and wait on a busy one.
    torch.set_num_threads(1)
    torch.manual_seed(settings.seed)
    model = SearchModel()
    loss_fn, cache_mb = make_loss(model, settings, data)
    tables = [model.vectors, model.query_log_weights, model.item_log_weights]
    optimizers = [
        torch.optim.SparseAdam(tables, lr=LEARNING_RATE),
        torch.optim.Adam([model.log_scale], lr=LEARNING_RATE),
    ]
    # The rate is constant for half of the steps, then falls to zero.
    schedules = [
        LambdaLR(each, lambda step: min(1.0, 2.0 - 2.0 * step / settings.steps))
        for each in optimizers
    ]
    queries, items = torch.from_numpy(data.queries), torch.from_numpy(data.items)
    item_of = torch.from_numpy(data.item_of)
    evaluated = {settings.steps * part // EVALUATIONS for part in range(1, EVALUATIONS + 1)}
    curve, seconds = [(0, 0.0, *evaluate(model, data))], 0.0
    progress = tqdm(_batches(data.train, settings), desc=name, unit="step", mininterval=0.5)
    for step, rows in enumerate(progress, 1):
        start = time.perf_counter()
        ids = item_of[rows]
        loss, shown = loss_fn(queries[rows], items[ids], ids)
        for each in optimizers:
            each.zero_grad()
        loss.backward()
        for each in (*optimizers, *schedules):
            each.step()
        seconds += time.perf_counter() - start
        if step in evaluated:
            curve.append((step, seconds, *evaluate(model, data)))
        figures = {**shown, "MRR": curve[-1][2]}
        progress.set_postfix({key: f"{value:.3f}" for key, value in figures.items()}, refresh=False)
    weights = {key: value.numpy() for key, value in model.state_dict().items()}
    return Result(curve, seconds, peak_memory_mb(), cache_mb, weights)


def evaluate(model: SearchModel, data: Data) -> tuple[float, float]:
    """Return MRR and recall@10 of each held-out query's best correct item, among all items."""
    embeddings = embed_all_items(model, data.items)
    parts, device = [], embeddings.device
    with torch.no_grad():
        # In parts, so that this score matrix does not determine the peak memory.
        tables = torch.from_numpy(data.queries[data.held_out]), torch.from_numpy(data.answers)
        for tokens, answers in zip(*(table.to(device).split(256) for table in tables), strict=True):
            parts.append(ranks(model.embed_queries(tokens), embeddings, answers))
    return mrr_and_recall(torch.cat(parts))


def ranks(queries: Tensor, items: Tensor, answers: Tensor) -> Tensor:
    """Return (n,), where each query finds the best of its answers among all items: 1 is best.

    queries, items: embeddings (n, width) and (m, width)
    answers:        rows (n, P) of the items that are right
    """
    scores = queries @ items.T
    best = scores.gather(1, answers).amax(dim=1, keepdim=True)
    wrong = scores.scatter(1, answers, -math.inf)
    return 1 + (~(wrong < best)).sum(dim=1)  # a tie counts as a loss, as NaN does


def mrr_and_recall(rank: Tensor) -> tuple[float, float]:
    """Return MRR and recall@10 of ranks."""
    rank = rank.double()
    return (1 / rank).mean().item(), (rank <= 10).double().mean().item()


@torch.no_grad()
def embed_all_items(model: SearchModel, items: np.ndarray) -> Tensor:
    """Return the embeddings (n, WIDTH) of items given as token ids."""
    parts = torch.from_numpy(items).to(model.vectors.device).split(1024)
    return torch.cat([model.embed_items({"tokens": tokens}) for tokens in parts])


def peak_memory_mb() -> float:
    """Return the most memory that this process has held at once, in MB."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux lets a process inherit its parent's ru_maxrss
        return int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1]) * 1024 / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (peak if sys.platform == "darwin" else peak * 1024) / 1e6


def _batches(train: np.ndarray, settings: Settings) -> Tensor:
    """Return (steps, batch size) rows: one shuffle of all of `train` after another."""
    generator = torch.Generator().manual_seed(settings.seed)
    wanted = settings.steps * settings.batch_size
    shuffles = [
        torch.randperm(len(train), generator=generator) for _ in range(-(-wanted // len(train)))
    ]
    rows = torch.from_numpy(train)[torch.cat(shuffles)[:wanted]]
    return rows.reshape(settings.steps, settings.batch_size)
