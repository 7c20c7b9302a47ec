"""Claim: at equal encoder work, shared draws and a readout make the gradient less noisy.

A model is trained for half of the demo's steps. At one moment the gradient of one batch's loss
with respect to all parameters is estimated many times, from a cache whose rows were embedded
some steps ago, and compared with the exact gradient of the full softmax over the same rows, fresh.

bias:     |E g - G| / |G|, with the squared noise of the mean taken out
variance: E |g - E g|^2 / |G|^2, of the draws alone
of batch: the same over the variance by choice of batch, which the exact gradient has too

For comparison, without draws: the batch's own negatives alone, and a memory of constants.

    python benchmarks/sharing_draws_makes_gradients_less_noisy.py
"""

import argparse
import itertools
import math
import statistics
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import negcache_torch as negcache
import torch
import tournament  # noqa: F401 - puts the examples where they are found
from _harness import save, table
from docstring_model import Data, Loss, SearchModel, Settings, cache_loss, train
from docstring_pairs import BUCKETS, PADDING, as_data, mine_pairs
from torch import Tensor
from torch.nn import functional

STEPS, MOMENT, LAGS = 1_000, 500, (0, 100, 400)
SLOTS, BATCH_SIZES, BATCHES, DRAWS = 8_192, (16, 64), 4, 48
MORE_BATCHES = 16  # for estimating the noise from the choice of the batch

ESTIMATORS: dict[str, dict[str, Any]] = {
    "paper": {},
    "paper, 4 draws": {"num_samples": 4},
    "shared": {"estimator": "shared"},
    "exact_query": {"estimator": "exact_query"},
}
OPTIONS: dict[str, dict[str, Any]] = {
    **ESTIMATORS,
    "exact_query + in-batch": {**ESTIMATORS["exact_query"], "in_batch_negatives": True},
    **{
        f"{name}, corrected": {**options, "staleness_correction": True}
        for name, options in ESTIMATORS.items()
    },
}
CONSTANT = ("in-batch", "memory")  # draw nothing


class Moment(NamedTuple):
    """Models at some steps of one training, and the rows that a cache would hold."""

    models: dict[int, SearchModel]
    queries: Tensor
    items: Tensor
    train: Tensor
    cached: Tensor


def trained(data: Data) -> Moment:
    """Train, and keep the requested models."""
    kept: dict[int, dict[str, Tensor]] = {}

    def make_loss(model: SearchModel, settings: Settings, data: Data) -> tuple[Loss, float]:
        loss, size = cache_loss(model, settings, data, estimator="paper", in_batch_negatives=False)
        step = 0

        def keeping(*batch: Tensor) -> Any:
            nonlocal step
            if MOMENT - step in LAGS:
                kept[step] = {key: value.clone() for key, value in model.state_dict().items()}
            step += 1
            return loss(*batch)

        return keeping, size

    train("training", make_loss, Settings(STEPS, 16, SLOTS, 0), data)
    models = {step: SearchModel() for step in kept}
    for step, model in models.items():
        model.load_state_dict(kept[step])
    shuffled = torch.from_numpy(data.train)[torch.randperm(len(data.train))]
    queries, items = torch.from_numpy(data.queries), torch.from_numpy(data.items)[data.item_of]
    return Moment(models, queries, items, shuffled[SLOTS:], shuffled[:SLOTS])


Batch = tuple[Tensor, Tensor]  # token ids of queries and of their items


def word_counts(tokens: Tensor) -> Tensor:
    """Return a sparse (texts, BUCKETS) matrix: how often each word is in each text."""
    text, position = torch.nonzero(tokens != PADDING, as_tuple=True)
    where = torch.stack([text, tokens[text, position].long()])
    size = (len(tokens), BUCKETS)
    return torch.sparse_coo_tensor(
        where, torch.ones(len(text)), size, check_invariants=True
    ).coalesce()


def embed_counted(model: SearchModel, counts: Tensor) -> Tensor:
    """Return what `model.embed_items` does, as one product: a word's weight multiplies its vector.

    For thousands of texts at once; the gradient is dense.
    """
    words = model.item_log_weights.exp() * model.vectors
    return functional.normalize(torch.sparse.mm(counts, words), dim=1)


def softmax_loss(model: SearchModel, batch: Batch, items: Tensor, *, in_batch: bool) -> Tensor:
    """Return the cross-entropy against the positive and all of `items` (n, WIDTH)."""
    query, positive = batch
    queries = model.scale() * model.embed_queries(query)
    scores = queries @ torch.cat([embed_counted(model, word_counts(positive)), items]).T
    if not in_batch:
        own = torch.eye(len(query), dtype=torch.bool)
        scores = scores.masked_fill(functional.pad(~own, (0, len(items))), -math.inf)
    return functional.cross_entropy(scores, torch.arange(len(query)))


class Quality:
    """Everything at one batch size and staleness; `exact` gradients are computed once."""

    def __init__(self, moment: Moment, rows: int, lag: int, counts: Tensor) -> None:
        self.model, then = moment.models[MOMENT], moment.models[MOMENT - lag]
        self.counts, self.rows, self.lag = counts, rows, lag
        with torch.no_grad():
            self.stale, fresh = (embed_counted(each, counts) for each in (then, self.model))
        self.staleness = (self.stale - fresh).square().sum(1).mean().item()
        self.features = moment.items[moment.cached]
        self.batches = [
            (moment.queries[batch], moment.items[batch]) for batch in moment.train.split(rows)
        ]
        self.exact = {
            in_batch: [
                self.gradient(
                    softmax_loss(
                        self.model, batch, embed_counted(self.model, counts), in_batch=in_batch
                    )
                )
                for batch in self.batches[:MORE_BATCHES]
            ]
            for in_batch in (False, True)
        }

    def gradient(self, loss: Tensor) -> Tensor:
        """Return the gradient of a loss: one vector of all parameters."""
        found = torch.autograd.grad(loss, list(self.model.parameters()))
        return torch.cat([each.to_dense().reshape(-1) for each in found])

    def measure(self, name: str) -> dict[str, Any]:
        """Return bias and variance of an estimator's gradient: means over a few batches."""
        options = OPTIONS.get(name, {})
        exact = self.exact[options.get("in_batch_negatives", False)]
        loss, draws = self._loss_of(name, options), 1 if name in CONSTANT else DRAWS
        biases, variances, absolute = [], [], []
        for batch, wanted in zip(self.batches[:BATCHES], exact, strict=False):
            variance, mean = _moments(self.gradient(loss(batch)) for _ in range(draws))
            norm = _square(wanted)
            biases.append((_square(mean - wanted) - variance / draws) / norm)
            variances.append(variance / norm)
            absolute.append(variance)
        return {
            "estimator": name,
            "rows": self.rows,
            "lag": self.lag,
            "staleness": self.staleness,
            "bias": math.sqrt(max(statistics.mean(biases), 0.0)),
            "variance": statistics.mean(variances),
            "of batch": statistics.mean(absolute) / _moments(self.exact[False])[0],
        }

    def _loss_of(self, name: str, options: dict[str, Any]) -> Callable[[Batch], Tensor]:
        model = self.model
        if name in CONSTANT:
            items = self.stale if name == "memory" else self.stale[:0]
            return lambda batch: softmax_loss(model, batch, items, in_batch=name == "in-batch")
        cache = negcache.NegativeCache(
            {"tokens": self.features, "embedding": self.stale},
            torch.zeros(SLOTS, dtype=torch.int32),
        )
        loss = negcache.CacheClassificationLoss(
            "embedding", ("tokens",), scale=model.scale, generator=0, **options
        )

        def estimate(batch: Batch) -> Tensor:
            query, positive = batch
            given = model.embed_queries(query), model.embed_items({"tokens": positive})
            return loss(model.embed_items, *given, cache).loss

        return estimate


def _square(vector: Tensor) -> float:
    return vector.square().sum().item()


def _moments(gradients: Iterable[Tensor]) -> tuple[float, Tensor]:
    """Return the unbiased variance, and the mean; for a single value, 0 and the value."""
    total, squares, count = None, 0.0, 0
    for found in gradients:
        total = found if total is None else total + found
        squares, count = squares + _square(found), count + 1
    mean = total / count
    return count * (squares / count - _square(mean)) / max(count - 1, 1), mean


def main() -> None:
    """Measure every estimator at every size and staleness."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", maxsplit=1)[0])
    every = [*CONSTANT, *OPTIONS]
    parser.add_argument("--estimators", nargs="+", choices=every, default=every)
    options = parser.parse_args()
    torch.set_num_threads(1)
    moment = trained(as_data(mine_pairs()))
    counts = word_counts(moment.items[moment.cached])
    found = []
    for rows, lag in itertools.product(BATCH_SIZES, LAGS):
        quality = Quality(moment, rows, lag, counts)
        found += [quality.measure(name) for name in options.estimators]
        print(table(found[-len(options.estimators) :]), flush=True)
    print("written to", save("gradient_noise", found, same=("estimator", "rows", "lag")))


if __name__ == "__main__":
    main()
