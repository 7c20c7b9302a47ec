"""Where the cache and the batch are: all in one place, or in shards (negcache_core.sharding).

A loss and its retrieval always run the same steps. The placement supplies those that depend on
where things are: draw, gather, give back, reduce.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from negcache_core.arrays._array import Array
from negcache_core.arrays.numerics import mean
from negcache_core.cache.manager import CacheManager
from negcache_core.cache.named import Caches, filled, gather
from negcache_core.cache.row_checks import NewRows
from negcache_core.cache.state import NegativeCache
from negcache_core.retrieval.draw import draw_slots
from negcache_core.retrieval.request import Request
from negcache_core.retrieval.result import Retrieval
from negcache_core.retrieval.tiled_scores import CacheScores


class Sizes(NamedTuple):
    """Of each replica: its queries, and the capacities of its caches."""

    rows: tuple[Any, ...]
    capacities: tuple[tuple[int, ...], ...]

    @property
    def slots(self) -> tuple[int, ...]:
        """The slots of each replica's shard."""
        return tuple(map(sum, self.capacities))


class Found(NamedTuple):
    """What was drawn for B queries, S rows each, n = B * S in all, and facts about it.

    rows:          "fields" and "ages" (n, …) of the queries' own draws; "slots" and "owned" (m,)
                   of those that this replica served
    drawn:         bool (B, S)
    log_partition: (B,) over all slots; entropy: (B,)
    readout:       (B, D), or None
    candidates:    (B, k), the best slot of each top-k group, and slots: (n,) drawn ones, numbered
                   over all caches; None without top_k
    route:         who served what, or None
    """

    rows: dict[str, Any]
    drawn: Array
    log_partition: Array
    entropy: Array
    readout: Array | None = None
    candidates: Array | None = None
    slots: Array | None = None
    route: Any = None


class Placement:
    """Everything is in one place: the whole cache and the whole batch."""

    sharded = False

    def init_caches(self, managers: Mapping[str, CacheManager]) -> Caches:
        """Return the part of each cache that is held here, empty."""
        return Caches({name: manager.init_cache() for name, manager in managers.items()})

    def remember(self) -> Callable[[], Any] | None:
        """Return a function that undoes what the next step changes here, or None."""
        return None

    def meet(self, request: Request) -> Sizes:
        """Return everyone's sizes, after checking that all have the same setup."""
        capacities = tuple([cache.age.shape[0] for cache in request.caches.values()])
        return Sizes((request.queries.shape[0],), (capacities,))

    def first(self, sizes: Sequence[int]) -> Any:
        """Return the position of one's own first row among those of all, which have `sizes`."""
        del sizes
        return 0

    def gather(self, arrays: Sequence[Any], sizes: Sequence[Any]) -> Sequence[Any]:
        """Return arrays (n, …) of all, which have `sizes` rows of each; None stays None."""
        del sizes
        return arrays

    def gather_fresh(self, array: Array, sizes: Sequence[int]) -> Any:
        """Return differentiable rows of all; None if there are only one's own."""
        del array, sizes

    def draw(self, request: Request, scores: list[CacheScores], sizes: Sizes) -> Found:
        """Draw for one's own queries, and fetch the rows; `scores` are for everyone's queries."""
        del sizes
        slots = draw_slots(request, scores)
        wanted, xp = request.wanted, request.backend.xp
        rows = gather(request.caches, slots.slots, slots.drawn, wanted.fields, xp)
        flat = None
        if slots.candidates is not None:
            flat = request.backend.xp.reshape(slots.slots, (-1,))
        return Found(
            rows,
            slots.drawn,
            slots.log_partition,
            slots.entropy,
            slots.readout,
            slots.candidates,
            flat,
        )

    def sum_logs(self, logs: Array, xp: Any) -> Array:
        """Return the logs (n,) of the sums of every replica's contributions."""
        del xp
        return logs

    def total(self, sums: Array, xp: Any) -> Array:
        """Return everyone's sums (n,), added up."""
        del xp
        return sums

    def fill(self, request: Request, sizes: Sizes) -> Array:
        """Return the share of all slots that hold a row."""
        del sizes
        return filled(request.caches, request.scorer.dtype, request.backend.xp)

    def give_back(self, arrays: Sequence[Array], route: Any) -> Sequence[Array]:
        """Return arrays (m, …) about the rows served here, of what is known to those who drew."""
        del route
        return arrays

    def reduce_mean(self, values: Array, retrieval: Retrieval, xp: Any) -> Array:
        """Return the mean of everyone's values (B,), or this replica's part of it."""
        del retrieval
        return mean(values, xp=xp)

    def bring_home(self, new: NewRows, cache: NegativeCache, key: str, xp: Any) -> NewRows:
        """Return the new rows whose items, identified by field `key`, belong here."""
        del cache, key, xp
        return new


HERE = Placement()
