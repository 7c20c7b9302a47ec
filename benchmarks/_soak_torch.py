"""The soak in PyTorch."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import negcache_torch as negcache
import torch
from _soak_law import Problem
from _soak_problem import (
    DATA_KEYS,
    DECAY,
    RATE,
    SCALE,
    Arrays,
    Batch,
    Turn,
    features_of_no_item,
    handler_of,
)

torch.set_num_threads(1)  # steps are small

RAISED = InterruptedError  # by the item network


def live_tensors() -> int:
    """Return the number of tensors that the collector tracks."""
    return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())


def tensors(arrays: Arrays) -> dict[str, torch.Tensor]:
    """Return arrays as tensors."""
    return {key: torch.as_tensor(rows) for key, rows in arrays.items()}


class Soaked:
    """A new handler and its towers; steps, saves and loads."""

    sizes = None

    def __init__(self, turn: Turn, towers: Arrays, seed: int) -> None:
        self.handler = handler_of(negcache, turn, seed)
        self.weights = {key: each.requires_grad_() for key, each in tensors(towers).items()}

    def towers(self) -> Arrays:
        """Return a copy of the towers' weights."""
        return {key: each.detach().numpy().copy() for key, each in self.weights.items()}

    def cache(self) -> Any:
        """Return the live cache."""
        return self.handler.cache

    def step(self, batch: Batch) -> tuple[Any, ...]:
        """Take a step; return the loss, the positives, and the serials and embeddings drawn."""
        seen: list[torch.Tensor] = []

        def network(features: dict[str, torch.Tensor]) -> torch.Tensor:
            if batch.fails:
                raise RAISED
            spoil = torch.as_tensor(batch.spoil_drawn).reshape(-1, 1)
            fresh = features["x"] @ self.weights["item"] + spoil
            seen.extend([features["serial"], fresh.detach()])
            return fresh

        features = tensors(batch.features)
        positive = features["x"] @ self.weights["item"] + torch.as_tensor(batch.spoil)[:, None]
        query = torch.as_tensor(batch.y) @ self.weights["query"]
        loss = self.handler.update_cache_and_compute_loss(
            network, query, positive, features, sample_weight=torch.as_tensor(batch.weight)
        )
        gradients = torch.autograd.grad(loss, list(self.weights.values()), allow_unused=True)
        with torch.no_grad():
            for weights, gradient in zip(self.weights.values(), gradients, strict=True):
                if gradient is not None and gradient.isfinite().all():
                    weights.mul_(DECAY).sub_(RATE * gradient)
        return (loss.item(), *(each.detach().numpy() for each in (positive, *seen)))

    def refresh(self, count: int, spoil: Any) -> tuple[Any, Any]:
        """Refresh; return the serials and the embeddings."""
        seen: list[Any] = []

        def network(features: dict[str, torch.Tensor]) -> torch.Tensor:
            fresh = features["x"] @ self.weights["item"] + torch.as_tensor(spoil)[:, None]
            seen.extend([features["serial"].numpy(), fresh.detach().numpy()])
            return fresh

        self.handler.refresh(network, count)
        return seen[0], seen[1]

    def save(self, path: Path) -> None:
        """Write the state."""
        self.handler.save(path)

    def load(self, path: Path) -> None:
        """Read it into this handler."""
        self.handler.load(path)

    def draw(self, y: Any) -> Any:
        """Return the slots that the handler draws."""
        query = torch.as_tensor(y) @ self.weights["query"]
        return self.handler.retrieve(query, tensors(features_of_no_item(len(y)))).slots["cache"]


def gradients(problem: Problem, estimator: str) -> Callable[[Any], tuple[Any, ...]]:
    """Return a function of the noise: the loss's gradients by both towers and the scale."""
    towers = (problem.towers["query"], problem.towers["item"], SCALE)
    leaves = [torch.tensor(each, dtype=torch.float64, requires_grad=True) for each in towers]
    query_tower, item_tower, scale = leaves
    y, x = torch.as_tensor(problem.y), torch.as_tensor(problem.x)
    cache = negcache.NegativeCache(tensors(problem.data), torch.as_tensor(problem.age))
    loss = negcache.CacheClassificationLoss(
        "embedding", DATA_KEYS, scale=lambda: scale, estimator=estimator, generator=0
    )

    def of(noise: Any) -> tuple[Any, ...]:
        result = loss(
            lambda features: features["x"] @ item_tower,
            y @ query_tower,
            x @ item_tower,
            cache,
            noise=torch.as_tensor(noise),
        )
        return tuple(each.numpy() for each in torch.autograd.grad(result.loss, leaves))

    return of
