"""The loss that is compared with, and that a cache may be warmed up by."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from .method import Batch
from .towers import TwoTowers


def in_batch_loss(
    model: TwoTowers, told: Callable[[Batch, Tensor], object] = lambda _, __: None
) -> Callable[[Batch], Tensor]:
    """Return the cross-entropy of each query's item against the batch's other items.

    told: gets the batch and its items' embeddings, as constants
    """

    def loss(batch: Batch) -> Tensor:
        items = model.items(batch.items)
        scores = model.scale() * model.queries(batch.queries) @ items.T
        own = torch.eye(len(batch.ids), dtype=torch.bool)
        # Another query's copy of a query's own item is no negative of it.
        scores = scores.masked_fill((batch.ids[:, None] == batch.ids) & ~own, -math.inf)
        told(batch, items.detach())
        return functional.cross_entropy(scores, torch.arange(len(batch.ids)))

    return loss
