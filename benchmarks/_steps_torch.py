"""The candidates in PyTorch."""

from collections.abc import Callable
from typing import Any

import negcache_torch as negcache
import torch
from _harness import handler_of


def candidates(slots: int, width: int, rows: int, vocabulary: int) -> dict[str, Callable[[], Any]]:
    """Return the bare product, a step on a full cache, and the published algorithm."""
    torch.manual_seed(0)
    embedding = torch.nn.Embedding(vocabulary, width)
    with torch.no_grad():
        embedding.weight /= width**0.5
    query = torch.randn(rows, width, requires_grad=True)
    ids = torch.randint(0, vocabulary, (rows,))
    handler = _full_handler(slots, width, vocabulary, torch.float32, embedding)
    halved = _full_handler(slots, width, vocabulary, torch.bfloat16, embedding)
    data = {key: value.clone() for key, value in handler.cache.data.items()}

    def network(features: dict[str, torch.Tensor]) -> torch.Tensor:
        return embedding(features["id"])

    def step(handler: negcache.CacheLossHandler) -> None:
        handler.update_cache_and_compute_loss(
            network, query, embedding(ids), {"id": ids}
        ).backward()

    def product() -> torch.Tensor:
        with torch.no_grad():
            return query @ data["embedding"].T

    def published() -> None:
        with torch.no_grad():
            scores = query @ data["embedding"].T
            noise = -torch.log(-torch.log(torch.rand_like(scores)))
            drawn = torch.argmax(scores + noise, dim=1)
        positive, negative = embedding(ids), embedding(data["id"][drawn])
        positive_score = (query * positive).sum(1)
        with torch.no_grad():
            every = torch.cat([positive_score[:, None], scores], dim=1)
            miss = 1 - torch.softmax(every, dim=1)[:, 0]
        (miss * ((query * negative).sum(1) - positive_score)).mean().backward()
        for key, values in (("embedding", negative.detach()), ("id", ids)):
            data[key] = data[key].index_put((drawn,), values)

    return {
        "product": product,
        "step": lambda: step(handler),
        "bfloat16 step": lambda: step(halved),
        "published": published,
    }


def _full_handler(
    slots: int, width: int, vocabulary: int, dtype: torch.dtype, embedding: torch.nn.Embedding
) -> negcache.CacheLossHandler:
    handler = handler_of(negcache, slots, width, torch.int64, dtype)
    with torch.no_grad():
        ids = torch.arange(slots) % vocabulary
        handler.cache.data["id"].copy_(ids)
        handler.cache.data["embedding"].copy_(embedding(ids))
        handler.cache.age.copy_(torch.arange(slots))
    return handler
