"""The ways of training that are compared: each makes a loss for the demo's model."""

import math
from functools import partial
from typing import NamedTuple

import _tasks  # noqa: F401 - puts the examples where they are found
import torch
from docstring_model import (
    WIDTH,
    Data,
    Loss,
    MakeLoss,
    SearchModel,
    Settings,
    cache_loss,
    in_batch_loss,
)
from docstring_pairs import BUCKETS, PADDING
from torch import Tensor
from torch.nn import functional


class Method(NamedTuple):
    """How to make a loss, and how much larger than that of the others the batch is."""

    make_loss: MakeLoss
    batches: float = 1.0


def memory_loss(
    model: SearchModel, settings: Settings, data: Data, *, in_batch_negatives: bool = False
) -> tuple[Loss, float]:
    """Cross-entropy against a first-in-first-out memory of embeddings, constants all of them.

    What is usually called a cross-batch memory: the negatives train the query tower alone.
    """
    del data
    size = settings.cache_size
    rows, ids, written = torch.zeros(size, WIDTH), torch.full((size,), -1), 0

    def loss(
        query_tokens: Tensor, item_tokens: Tensor, item_ids: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        nonlocal written
        queries = model.scale() * model.embed_queries(query_tokens)
        items = model.embed_items({"tokens": item_tokens})
        positive = (queries * items).sum(1, keepdim=True)
        allowed = (ids != item_ids[:, None]) & (ids >= 0)
        parts = [positive, (queries @ rows.clone().T).masked_fill(~allowed, -math.inf)]
        if in_batch_negatives:
            same = item_ids[:, None] == item_ids
            parts.append((queries @ items.T).masked_fill(same, -math.inf))
        value = functional.cross_entropy(
            torch.cat(parts, 1), torch.zeros(len(queries), dtype=torch.int64)
        )
        slots = (written + torch.arange(len(items))) % size
        rows[slots], ids[slots] = items.detach(), item_ids
        written += len(items)
        return value, {"loss": value.item()}

    return loss, rows.nbytes / 1e6


def full_loss(model: SearchModel, settings: Settings, data: Data) -> tuple[Loss, float]:
    """Cross-entropy against every item of the training set, all embedded anew at each step."""
    del settings
    gallery = torch.unique(torch.from_numpy(data.item_of[data.train]))
    counts = word_counts(torch.from_numpy(data.items)[gallery])
    place = torch.full((len(data.items),), -1)
    place[gallery] = torch.arange(len(gallery))
    for table in (model.vectors, model.item_log_weights):
        # The model's optimizer takes sparse gradients, and this one has all rows.
        table.register_post_accumulate_grad_hook(_make_sparse)

    def loss(
        query_tokens: Tensor, item_tokens: Tensor, ids: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        del item_tokens
        scores = model.scale() * model.embed_queries(query_tokens) @ embed_counted(model, counts).T
        value = functional.cross_entropy(scores, place[ids])
        return value, {"loss": value.item()}

    return loss, 0.0


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


def _make_sparse(table: Tensor) -> None:
    rows = table.grad.any(dim=1).nonzero()[:, 0]
    table.grad = torch.sparse_coo_tensor(
        rows[None], table.grad[rows], table.shape, is_coalesced=True, check_invariants=False
    )


METHODS = {
    "in-batch": Method(in_batch_loss),
    # A step of the others embeds a query, a positive and a drawn row where this embeds two texts.
    "in-batch, equal encoder work": Method(in_batch_loss, 1.5),
    "memory": Method(memory_loss),
    "memory + in-batch": Method(partial(memory_loss, in_batch_negatives=True)),
    **{
        name + (" + in-batch" if both else ""): Method(
            partial(cache_loss, estimator=name, in_batch_negatives=both)
        )
        for name in ("paper", "shared", "exact_query")
        for both in (False, True)
    },
    "full softmax": Method(full_loss),
}
