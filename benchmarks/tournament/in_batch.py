"""The loss to compare with, which may also warm up a cache."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from .method import Batch
from .towers import TwoTowers

TINY = 1e-30


def in_batch_loss(
    model: TwoTowers,
    told: Callable[[Batch, Tensor, Tensor], object] = lambda *_: None,
    *,
    symmetric: float = 0.0,
    hard_weight: float = 0.0,
) -> Callable[[Batch], Tensor]:
    """Return the cross-entropy of each query's item against the batch's other items.

    told:        called with the batch and its queries' and items' embeddings, as constants
    symmetric:   share of the loss that is the other way round: each item's query against the
                 batch's other queries
    hard_weight: see `weighed_mean`
    """
    check_shares(symmetric=symmetric)
    check_hard_weight(hard_weight)

    def loss(batch: Batch) -> Tensor:
        items = model.items(batch.items)
        queries = model.queries(batch.queries)
        scores = model.scale() * queries @ items.T
        told(batch, queries.detach(), items.detach())
        value = (1.0 - symmetric) * against_batch(scores, batch.ids, hard_weight)
        if symmetric:
            value = value + symmetric * against_batch(scores.T, batch.ids, hard_weight)
        return value

    return loss


def against_batch(scores: Tensor, ids: Tensor, hard_weight: float = 0.0) -> Tensor:
    """Return the cross-entropy of scores (B, B), with the pairs on the diagonal.

    ids: (B,) of the pairs' items
    """
    own = torch.eye(len(ids), dtype=torch.bool)
    # Another pair with the same item is not a negative, either by its item or by its query.
    scores = scores.masked_fill((ids[:, None] == ids) & ~own, -math.inf)
    losses = functional.cross_entropy(scores, torch.arange(len(ids)), reduction="none")
    return weighed_mean(losses, hard_weight)


def weighed_mean(losses: Tensor, hard_weight: float) -> Tensor:
    """Return the mean of losses (B,), each weighed by how hard it is.

    hard_weight: g of the weights (1 - p)^g, where p = exp(-loss) is the probability of the right
                 item. They are constants, and their mean is 1.
    """
    weights = (-torch.expm1(-losses.detach())) ** hard_weight
    return (weights / weights.mean().clamp_min(TINY) * losses).mean()


def check_shares(**shares: float) -> None:
    """Exit unless these shares of a loss leave some of it to the first part."""
    if min(shares.values()) < 0 or sum(shares.values()) >= 1:
        raise SystemExit(f"{shares} are shares of the loss: from 0, and together below 1.")


def check_hard_weight(hard_weight: float) -> None:
    """Exit unless it is a power that gives hard pairs no less weight."""
    if not 0 <= hard_weight < math.inf:
        raise SystemExit(f"hard_weight {hard_weight} is a power: 0 for none, or above.")
