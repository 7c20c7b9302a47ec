"""A training method: a loss for each phase, and what its steps cost in encoder calls."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .task import Task
from .towers import TwoTowers

FORWARD_ONLY = 1 / 3  # the cost of a forward call, as a share of a trained call


class Batch(NamedTuple):
    """Token numbers of queries and of their items, (B, words), and the items' rows (B,)."""

    queries: Tensor
    items: Tensor
    ids: Tensor


class Setting(NamedTuple):
    """What a training starts with; `options` are the method's own."""

    model: TwoTowers
    task: Task
    batch: int
    cache_size: int
    seed: int
    options: dict[str, Any]


class Phase(NamedTuple):
    """A share of the budget, and what happens in it.

    loss:  a batch -> the loss
    calls: encoder calls of a step
    share: of the budget
    enter: called before the first step, with its cost in calls
    """

    loss: Callable[[Batch], Tensor]
    calls: float
    share: float = 1.0
    enter: Callable[[], object] = lambda: None
    price: float = 0.0

    def steps(self, budget: int) -> int:
        """Return how many steps its share allows."""
        return int((self.share * budget - self.price) / self.calls)


class Training(NamedTuple):
    """Phases, one after another, and a function that returns the figures of the last step."""

    phases: Sequence[Phase]
    shown: Callable[[], dict[str, float]] = dict


Begin = Callable[[Setting], Training]
