"""The candidates in PyTorch."""

import functools
import itertools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import negcache_torch as negcache
import torch
from _harness import copied_update, handler_of, result_of


class Candidates:
    """Makes each candidate on demand, by name: its methods return what to time."""

    def __init__(self, slots: int, width: int, rows: int, vocabulary: int) -> None:
        torch.manual_seed(0)
        self.slots, self.width = slots, width
        self.embedding = torch.nn.Embedding(vocabulary, width)
        with torch.no_grad():
            self.embedding.weight /= width**0.5
        self.query = torch.randn(rows, width, requires_grad=True)
        self.features = {"id": torch.randint(0, vocabulary, (rows,))}
        self.all_ids = torch.arange(slots) % vocabulary

    def network(self, features: dict[str, torch.Tensor]) -> torch.Tensor:
        """Look embeddings up."""
        return self.embedding(features["id"])

    @torch.no_grad()
    def full_handler(self, dtype: torch.dtype) -> negcache.CacheLossHandler:
        """Return a handler with a full cache."""
        handler = handler_of(negcache, self.slots, self.width, torch.int64, dtype)
        handler.cache.data["id"].copy_(self.all_ids)
        handler.cache.data["embedding"].copy_(self.embedding(self.all_ids))
        handler.cache.age.copy_(torch.arange(self.slots))
        return handler

    @functools.cached_property
    def handler(self) -> negcache.CacheLossHandler:
        """The handler of float32 rows, shared by candidates."""
        return self.full_handler(torch.float32)

    @functools.cached_property
    @torch.no_grad()
    def to_commit(self) -> tuple[Any, ...]:
        """What one step commits."""
        given = (self.network(self.features), self.features)
        return result_of(self.handler, self.network, self.query, *given), *given

    def product(self) -> Callable[[], Any]:
        """Multiply queries and cache."""
        table = self.handler.cache.data["embedding"]
        return torch.no_grad()(lambda: self.query @ table.T)

    def step(self, handler: Any = None) -> Callable[[], Any]:
        """Take a whole step."""
        handler = handler or self.handler
        return lambda: handler.update_cache_and_compute_loss(
            self.network, self.query, self.network(self.features), self.features
        ).backward()

    def bfloat16_step(self) -> Callable[[], Any]:
        """Take the same on bfloat16 rows."""
        return self.step(self.full_handler(torch.bfloat16))

    def float16_step(self) -> Callable[[], Any]:
        """Take the same on float16 rows."""
        return self.step(self.full_handler(torch.float16))

    def update(self) -> Callable[[], Any]:
        """Write a step's rows in place."""
        return functools.partial(self.handler.commit, *self.to_commit)

    def copying_update(self) -> Callable[[], Any]:
        """Write a step's rows into a copy."""
        return functools.partial(copied_update, self.handler, *self.to_commit)

    def published(self) -> Callable[[], Any]:
        """Take a step of the published algorithm."""
        ids, query, embedding = self.features["id"], self.query, self.embedding
        data = {"id": self.all_ids, "embedding": embedding.weight.detach()[self.all_ids]}

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

        return published


def bytes_of_a_step(step: Callable[[], Any], *size: int) -> int:
    """Return the highest sum of PyTorch's allocations less frees during one step."""
    del size
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = [event for event in events if event.get("name") == "[memory]"]
    changes.sort(key=lambda event: event["ts"])
    return max(itertools.accumulate(event["args"]["Bytes"] for event in changes))
