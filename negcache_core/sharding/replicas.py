"""Replicas: the processes or devices that share a step, and what they send each other.

Each holds a shard of the cache and a part of the batch. An adapter supplies these few verbs on its
framework. What is sent depends on the batch, the width and the number of replicas, never on the
capacity.
"""

import functools
import operator
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Generic, NamedTuple

from negcache_core.arrays._array import ArrayT
from negcache_core.arrays.backend import Backend
from negcache_core.errors import OptionError


class Route(NamedTuple):
    """Which replica serves each draw of the whole batch; draws are numbered over all replicas.

    owner:   (n,) the replica whose shard the drawn slot is in
    entries: (m,) the draws that this replica serves, ascending
    sizes:   draws of each replica's own queries
    """

    owner: Any
    entries: Any
    sizes: tuple[int, ...]


class Replicas(ABC, Generic[ArrayT]):
    """What replicas do together. All of them call every verb, in the same order.

    count:   how many there are; rank: which one this is, a number that may be traced
    turns:   in how many equal parts a replica makes the draws it serves, which saves memory
    lasting: whether this object may be kept from one step to the next
    """

    count: int
    rank: Any
    turns: int = 1
    lasting = True

    def first(self, sizes: Sequence[int]) -> Any:
        """Return the position of one's own first row among those of all, which have `sizes`."""
        return sum(sizes[: self.rank])

    def own(self, array: ArrayT, sizes: Sequence[int]) -> ArrayT:
        """Return this replica's rows of those of all."""
        start = self.first(sizes)
        return array[start : start + sizes[self.rank], ...]

    @abstractmethod
    def numbers(self, own: Sequence[int], like: ArrayT) -> list[tuple[int, ...]]:
        """Return every replica's few integers, by rank."""

    @abstractmethod
    def texts(self, own: str, like: ArrayT) -> list[str]:
        """Return every replica's text, by rank."""

    def noise(
        self, backend: Backend, generator: Any, rows: Sequence[int], draws: int, like: ArrayT
    ) -> ArrayT:
        """Return noise (n, draws, 2) for the queries of all replicas, the same on each of them."""
        # Every replica makes all of it: the whole job has a single generator state.
        return backend.uniform(generator, (sum(rows), draws, 2), like)

    def share_generator(self, generator: Any, like: ArrayT) -> None:
        """Give every replica the first one's noise, if their generators may differ."""
        del generator, like  # not an empty body: TensorFlow's AutoGraph would warn

    def check_slots(self, slots: Mapping[str, int], facts: Mapping[str, Any]) -> None:
        """Raise ShapeError unless the caches' `slots` here are a shard of what `facts` describe."""
        del slots, facts

    @abstractmethod
    def gather(self, arrays: Sequence[ArrayT], sizes: Sequence[int]) -> list[ArrayT]:
        """Return arrays (n, …) concatenated over all replicas, which have `sizes` rows of each."""

    def total(self, sums: ArrayT, xp: Any) -> Any:
        """Return sums (n,) added up over all replicas."""
        (parts,) = self.gather([sums[None, :]], (1,) * self.count)
        return xp.sum(parts, axis=0)

    @abstractmethod
    def gather_fresh(self, array: ArrayT, sizes: Sequence[int]) -> ArrayT:
        """Gather with gradients: a row's gradient is the sum over all replicas."""

    @abstractmethod
    def parts(self, array: ArrayT, sizes: Sequence[int]) -> ArrayT:
        """Send rows (sum of sizes, …) to the replicas they belong to: (replicas, own rows, …)."""

    def sum_of_parts(self, array: ArrayT, sizes: Sequence[int]) -> ArrayT:
        """Return the sum over replicas (own rows, …) of the `parts` sent here."""
        parts = self.parts(array, sizes)
        return functools.reduce(operator.add, [parts[rank, ...] for rank in range(self.count)])

    @abstractmethod
    def serve(self, arrays: Sequence[ArrayT], route: Route) -> list[ArrayT]:
        """Send rows (m, …), for the draws that this replica serves, to those who drew them.

        Returns the rows of this replica's own draws, in order.
        """

    @abstractmethod
    def give_back(self, arrays: Sequence[ArrayT], route: Route) -> list[ArrayT]:
        """Send the rows of one's own draws back to their owners: the reverse of `serve`."""

    @abstractmethod
    def entries(self, owner: ArrayT) -> ArrayT:
        """Return the positions (m,) at which `owner` (n,) is this replica, ascending."""

    def agree(self, own: Mapping[str, Any], like: ArrayT) -> None:
        """Raise OptionError if the replicas' facts differ; the message names those that do."""
        texts = self.texts(_as_text(own), like)
        if len(set(texts)) == 1:
            return
        every = [dict(line.split(" = ", 1) for line in text.split("\n")) for text in texts]
        unlike = [
            name
            for name in sorted(set().union(*every))
            if len({facts.get(name) for facts in every}) > 1
        ]
        given = "; ".join(
            f"{name} is " + ", ".join(f"{facts.get(name)} on {r}" for r, facts in enumerate(every))
            for name in unlike
        )
        raise OptionError(f"the ranks are set up differently: {given}. Give all of them the same.")


def _as_text(facts: Mapping[str, Any]) -> str:
    lines = (f"{name} = {value}".replace("\n", " ") for name, value in sorted(facts.items()))
    return "\n".join(lines)


def shard_slots(capacity: int, count: int) -> tuple[int, ...]:
    """Return how many of `capacity` slots each of `count` replicas holds: the longest first.

    This is how frameworks split a tensor into chunks, so their checkpoints can be read by another
    number of replicas.

    >>> shard_slots(10, 4)
    (3, 3, 3, 1)
    """
    chunk = -(-capacity // count)
    return tuple(max(0, min(chunk, capacity - rank * chunk)) for rank in range(count))
