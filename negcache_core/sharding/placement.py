"""A cache that is split into shards, one per replica; each replica has a part of the batch.

The softmax and the loss equal those of one big cache and the whole batch: every query is scored
on every shard, and if drawn rows or the batch's positives are shared, all of them are.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from negcache_core.arrays._array import Array, cast, dtype_name, length
from negcache_core.arrays.numerics import log_sum_exp
from negcache_core.cache.manager import CacheManager
from negcache_core.cache.named import Caches, filled, gather
from negcache_core.cache.row_checks import CheckedRows, NewRows
from negcache_core.cache.state import NegativeCache, is_written
from negcache_core.errors import CapacityError, ShapeError
from negcache_core.retrieval.placement import Found, Placement, Sizes
from negcache_core.retrieval.request import Request
from negcache_core.retrieval.result import Retrieval
from negcache_core.retrieval.tiled_scores import CacheScores
from negcache_core.retrieval.top_k import check_groups
from negcache_core.sharding.draw import ShardDraw, draw_from_shards
from negcache_core.sharding.home import bring_home
from negcache_core.sharding.replicas import Replicas, shard_slots
from negcache_core.sharding.top_k import draw_from_shard_groups


class Shards(Placement):
    """Each replica holds a shard of every cache and a part of the batch, which may be empty.

    make: returns the replicas that share the cache, as seen from where it is called

    `facts` must be the same on all of them; the first step compares them.
    """

    sharded = True

    def __init__(self, make: Callable[[], Replicas]) -> None:
        self._make = make
        self._lasting: Replicas | None = None
        self.facts: dict[str, Any] = {}
        self._agreed = False

    def of(self, replicas: Replicas) -> "Shards":
        """Return the same shards, for replicas that are already known."""
        found = Shards(lambda: replicas)
        found.facts = self.facts
        return found

    @property
    def replicas(self) -> Replicas:
        """The replicas that share the cache."""
        if self._lasting is not None:
            return self._lasting
        replicas = self._make()
        if replicas.lasting:
            self._lasting = replicas
        return replicas

    def init_caches(self, managers: Mapping[str, CacheManager]) -> Caches:
        """Return this replica's shard of each cache, empty.

        Raises CapacityError if a replica would have no slot.
        """
        replicas, shards = self.replicas, Caches({})
        for name, manager in managers.items():
            sizes = shard_slots(manager.cache_size, replicas.count)
            if 0 in sizes:
                raise CapacityError(
                    f"cache {name!r} of {manager.cache_size} slots leaves one of "
                    f"{replicas.count} replicas without any, {list(sizes)}: raise cache_size."
                )
            shards[name] = manager.init_shard(sizes[replicas.rank])
        return shards

    def remember(self) -> Callable[[], Any]:
        """Return a function that forgets an agreement: a restored generator is no longer shared."""
        agreed = self._agreed
        return lambda: setattr(self, "_agreed", agreed)

    def meet(self, request: Request) -> Sizes:
        """Return everyone's sizes. Raises OptionError or ShapeError if they do not match."""
        self._agree(request)
        own, keys = request.batch.own, request.wanted.id_keys
        columns = [0] if own is None or not keys else [ids.shape[1] for ids in own.ids]
        capacities = [cache.age.shape[0] for cache in request.caches.values()]
        numbers = [request.queries.shape[0], *columns, *capacities]
        every = self.replicas.numbers(numbers, request.queries)
        for place, key in enumerate(keys, 1):
            if len({numbers[place] for numbers in every}) > 1:
                what = "positive_ids" if len(keys) == 1 else f"positive_ids[{key!r}]"
                raise ShapeError(
                    f"{what} have {[numbers[place] for numbers in every]} columns by rank: "
                    "expected the same number on every rank. Pad short rows by repeating an id."
                )
        first = 1 + len(columns)
        return Sizes(
            tuple(numbers[0] for numbers in every), tuple(numbers[first:] for numbers in every)
        )

    def first(self, sizes: Sequence[int]) -> Any:
        """Return the position of one's own first row among those of all, which have `sizes`."""
        return self.replicas.first(sizes)

    def gather(self, arrays: Sequence[Any], sizes: Sequence[Any]) -> Sequence[Any]:
        """Return arrays of all replicas; None stays None."""
        sent = [each for each in arrays if each is not None]
        found = iter(self.replicas.gather(sent, sizes) if sent else [])
        return [None if each is None else next(found) for each in arrays]

    def gather_fresh(self, array: Array, sizes: Sequence[int]) -> Array | None:
        """Return rows of all replicas; a row's gradient is the sum of those on each."""
        return self.replicas.gather_fresh(array, sizes)

    def draw(self, request: Request, scores: list[CacheScores], sizes: Sizes) -> Found:
        """Draw from this shard for everyone's queries, and send the rows to those who drew them."""
        xp, wanted = request.backend.xp, request.wanted
        found = self._draw(request, scores, sizes)
        served = found.scores > -float("inf")
        rows = gather(request.caches, found.slots, served, wanted.fields, xp)
        fields, ages = rows["fields"], rows["ages"]
        sent = [found.scores, ages, *fields.values()]
        if found.slot_of_all is not None:
            sent.append(found.slot_of_all)
        own_scores, ages, *received = self.replicas.serve(sent, found.route)
        rows["fields"], rows["ages"] = dict(zip(fields, received, strict=False)), ages
        own_scores = xp.reshape(own_scores, (-1, wanted.num_samples))
        drawn = own_scores > -float("inf")
        usable = found.log_partition > -float("inf")
        mean_score = xp.mean(xp.where(drawn, own_scores, 0.0), axis=1)
        if wanted.prefixes is None:
            entropy = xp.where(usable, found.log_partition - mean_score, 0.0)
        else:  # these scores are logs of probabilities
            entropy = -mean_score
        return Found(
            rows,
            drawn,
            found.log_partition,
            entropy,
            found.readout,
            found.candidates,
            None if found.slot_of_all is None else received[-1],
            found.route,
        )

    def _draw(self, request: Request, scores: list[CacheScores], sizes: Sizes) -> ShardDraw:
        replicas, wanted, noise = self.replicas, request.wanted, request.noise
        if noise is None:
            draws, like = wanted.num_samples, scores[0].queries
            noise = replicas.noise(request.backend, request.generator, sizes.rows, draws, like)
        else:
            (noise,) = replicas.gather([noise], sizes.rows)
        if wanted.top_k is None:
            return draw_from_shards(scores, noise, replicas, sizes.rows, readout=wanted.reads_out)
        check_groups(wanted.top_k, sum(sizes.slots))
        return draw_from_shard_groups(
            scores,
            wanted.top_k,
            replicas.own(noise, sizes.rows),
            replicas,
            sizes.rows,
            sizes.capacities,
        )

    def sum_logs(self, logs: Array, xp: Any) -> Array:
        """Add up every replica's contributions, as logarithms (n,)."""
        replicas = self.replicas
        (parts,) = replicas.gather([logs[None, :]], (1,) * replicas.count)
        return log_sum_exp(parts, 0, xp=xp)

    def total(self, sums: Array, xp: Any) -> Array:
        """Add up each replica's sums (n,)."""
        found: Array = self.replicas.total(sums, xp)
        return found

    def fill(self, request: Request, sizes: Sizes) -> Array:
        """Return the share of all replicas' slots that hold a row."""
        replicas, xp = self.replicas, request.backend.xp
        slots = sum(cache.age.shape[0] for cache in request.caches.values())
        written = filled(request.caches, request.scorer.dtype, xp) * slots
        (every,) = replicas.gather([written[None]], (1,) * replicas.count)
        return xp.sum(every) / sum(sizes.slots)

    def give_back(self, arrays: Sequence[Array], route: Any) -> Sequence[Array]:
        """Send the rows of one's own draws back to their owners."""
        return self.replicas.give_back(arrays, route)

    def reduce_mean(self, values: Array, retrieval: Retrieval, xp: Any) -> Array:
        """Return this replica's share of the global mean, times the number of replicas.

        Averaged over replicas, as data-parallel training averages gradients, it is the mean over
        the whole batch, even if parts differ in size.
        """
        queries = sum(retrieval.route.sizes) // retrieval.drawn.shape[1]
        return xp.sum(values) * (self.replicas.count / max(queries, 1))

    def bring_home(self, new: NewRows, cache: NegativeCache, key: str, xp: Any) -> NewRows:
        """Exchange new rows, so that each reaches the replica that stores its item."""
        replicas = self.replicas
        mask: Any = new.mask  # new rows of a step have a mask
        keys = cast(new.rows[key], cache.data[key].dtype, xp)
        numbers = replicas.numbers([mask.shape[0], cache.age.shape[0]], mask)
        sizes, slots = zip(*numbers, strict=True)
        held, written = cache.data[key], is_written(cache.age)
        route = bring_home(keys, mask, held, written, replicas, sizes, slots, xp=xp)
        *rows, mask = replicas.give_back([*new.rows.values(), mask], route)
        mine = xp.take_rows(route.owner, route.entries) == replicas.rank
        found = CheckedRows(zip(new.rows, rows, strict=True))
        return NewRows(found, length(mask, xp), mask & mine)

    def _agree(self, request: Request) -> None:
        """Raise OptionError unless all replicas have equal options, fields and `facts`; once."""
        replicas, caches = self.replicas, request.caches
        replicas.check_slots(
            {name: cache.age.shape[0] for name, cache in caches.items()}, self.facts
        )
        if self._agreed:
            return
        fields = {
            f"{name}.{key}": f"{tuple(table.shape[1:])} {table.dtype}"
            for name, cache in caches.items()
            for key, table in cache.data.items()
        }
        facts = {**self.facts, **fields, "query dtype": dtype_name(request.queries.dtype)}
        replicas.agree(facts, request.queries)
        replicas.share_generator(request.generator, request.queries)
        self._agreed = True


def check_equal_shards(
    managers: Mapping[str, CacheManager], count: int, holder: str = "replica"
) -> None:
    """Raise CapacityError unless each cache can be split into `count` shards of one size.

    holder: what holds a shard, in words
    """
    for name, manager in managers.items():
        if manager.cache_size % count:
            raise CapacityError(
                f"cache {name!r} of {manager.cache_size} slots cannot be split into {count} "
                f"equal shards, one for each {holder}: choose a cache_size that is a multiple of "
                f"{count}."
            )
