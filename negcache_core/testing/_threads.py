"""Replicas without a framework: threads of one process that exchange values."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from negcache_core.adapter import Replicas, Route
from negcache_core.errors import OptionError

_this_thread = threading.local()


class Threads:
    """The threads that `run` started, from the view of one: its rank, and their count.

    >>> Threads.run(2, lambda rank: Threads().exchange(10 * rank))
    [[0, 10], [0, 10]]
    """

    def __init__(self) -> None:
        if not hasattr(_this_thread, "place"):
            raise OptionError("no threads share anything here: call this in Threads.run.")
        self.rank, self._shown, self._barrier = _this_thread.place
        self.count = len(self._shown)

    @staticmethod
    def run(count: int, function: Callable[[int], Any]) -> list[Any]:
        """Return function(rank) of `count` threads; re-raise the error of the first that fails."""
        shown: list[Any] = [None] * count
        results: list[Any] = [None] * count
        errors: list[BaseException] = []
        barrier = threading.Barrier(count, timeout=60)  # seconds, in case one does not arrive

        def work(rank: int) -> None:
            _this_thread.place = (rank, shown, barrier)
            try:
                results[rank] = function(rank)
            except BaseException as error:  # noqa: BLE001 - raised again where `run` was called
                errors.append(error)
                barrier.abort()  # do not wait for a thread that has failed

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return results

    def exchange(self, value: Any) -> list[Any]:
        """Return every thread's value, by rank; all of them call this, in the same order."""
        self._shown[self.rank] = value
        self._barrier.wait()
        every = list(self._shown)
        self._barrier.wait()  # nobody writes the next value before all have read this one
        return every


class ThreadReplicas(Replicas[Any]):
    """NumPy's replicas, in `Threads`: the reference for those of other libraries."""

    def __init__(self, group: Any = None) -> None:
        del group  # the only threads are those of one run
        self.threads = Threads()
        self.rank, self.count = self.threads.rank, self.threads.count

    def numbers(self, own: Sequence[int], like: Any) -> list[tuple[int, ...]]:
        """Return every replica's few integers, by rank."""
        del like
        return [tuple(each) for each in self.threads.exchange(own)]

    def texts(self, own: str, like: Any) -> list[str]:
        """Return every replica's text, by rank."""
        del like
        return self.threads.exchange(own)

    def share_generator(self, generator: Any, like: Any) -> None:
        """Give every replica the first one's noise."""
        del like
        bits = generator.bit_generator
        bits.state = self.threads.exchange(bits.state)[0]

    def gather(self, arrays: Sequence[Any], sizes: Sequence[int]) -> list[Any]:
        """Return arrays concatenated over all replicas."""
        del sizes  # they have the sizes of `arrays`
        every = self.threads.exchange(arrays)
        return [np.concatenate(parts) for parts in zip(*every, strict=True)]

    def gather_fresh(self, array: Any, sizes: Sequence[int]) -> Any:
        """Gather; NumPy has no gradients."""
        return self.gather([array], sizes)[0]

    def parts(self, array: Any, sizes: Sequence[int]) -> Any:
        """Return this replica's rows of everyone's array, by rank."""
        return np.stack([self.own(each, sizes) for each in self.threads.exchange(array)])

    def serve(self, arrays: Sequence[Any], route: Route) -> list[Any]:
        """Return the rows of this replica's own draws, as sent by their owners."""
        entries, *rows = self.gather([route.entries, *arrays], ())
        order = np.argsort(entries)
        return [self.own(each[order], route.sizes) for each in rows]

    def give_back(self, arrays: Sequence[Any], route: Route) -> list[Any]:
        """Return the rows of those draws that this replica serves."""
        return [each[route.entries] for each in self.gather(arrays, ())]

    def entries(self, owner: Any) -> Any:
        """Return the positions at which `owner` is this replica."""
        return np.flatnonzero(owner == self.rank)
