"""The cache classification loss on a cache that is cut into shards, one for each replica.

The law and the loss are those of the one big cache and the whole batch: every query is scored on
every shard, and where an estimator shares drawn rows or the batch's positives, it is all of them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from negcache_core.arrays._array import Array, cast, dtype_name, take
from negcache_core.arrays.numerics import log_sum_exp, mean
from negcache_core.cache.manager import CacheManager
from negcache_core.cache.named import filled, gather
from negcache_core.cache.state import NegativeCache, is_written
from negcache_core.errors import CapacityError, OptionError, ShapeError
from negcache_core.losses.classification import CacheClassificationLoss
from negcache_core.losses.nonfinite import Embedded
from negcache_core.retrieval.positives import Positives, others_of
from negcache_core.retrieval.proposal import Pool, cross_scores, pool_of
from negcache_core.retrieval.result import Retrieval
from negcache_core.retrieval.tiled_scores import CacheScores
from negcache_core.retrieval.top_k import check_groups
from negcache_core.sharding.draw import ShardDraw, draw_from_shards
from negcache_core.sharding.home import bring_home
from negcache_core.sharding.replicas import Replicas, shard_slots
from negcache_core.sharding.top_k import draw_from_shard_groups


class Sizes(NamedTuple):
    """Of each replica: its queries, and the capacities of its caches."""

    rows: tuple[int, ...]
    capacities: tuple[tuple[int, ...], ...]

    @property
    def slots(self) -> tuple[int, ...]:
        """The slots of each replica's shard."""
        return tuple(map(sum, self.capacities))


class ShardedLoss(CacheClassificationLoss):
    """What an adapter's DistributedCacheClassificationLoss adds to CacheClassificationLoss.

    Every replica calls it with its own part of the batch, which may be empty, and its own shard.
    With the default reducer the value is a replica's share of the global mean, times the number of
    replicas: averaged over replicas, as data-parallel training averages gradients, it is the mean
    over the whole batch, also where parts differ in size. Other reducers see one's own values.

    Raises OptionError for a `retrieval_fn`, as no replica has the whole score matrix; and, in the
    first step, where the replicas were not set up alike.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        if self.retrieval_fn is not None:
            raise OptionError(
                "retrieval_fn needs the whole score matrix, and each replica has that of its shard "
                "only: leave it out to draw from the softmax over all shards."
            )
        self.facts: dict[str, Any] = {}
        self._agreed = False

    def _remembered(self) -> list[Callable[[], Any] | None]:
        agreed = self._agreed

        def undo() -> None:
            self._agreed = agreed  # a generator that is put back is no longer shared

        return [*super()._remembered(), undo]

    @property
    def replicas(self) -> Replicas:
        """The replicas that share the cache."""
        raise OptionError(f"{self.backend.name!r} has no replicas: use an adapter's loss.")

    def agree(self, cache: Mapping[str, NegativeCache], like: Array) -> None:
        """Raise OptionError unless all replicas have equal options, fields and `facts`; once."""
        if self._agreed:
            return
        fields = {
            f"{name}.{key}": f"{tuple(table.shape[1:])} {table.dtype}"
            for name, each in cache.items()
            for key, table in each.data.items()
        }
        names = (
            *("embedding_key", "data_keys", "top_k", "estimator", "num_samples", "id_key"),
            *("in_batch_negatives", "log_frequency_key", "staleness_correction"),
        )
        facts = {name: getattr(self, name) for name in names}
        facts["query dtype"] = dtype_name(like.dtype)
        self.replicas.agree({**facts, **fields, **self.facts}, like)
        self._share_generator(like)
        self._agreed = True

    def _share_generator(self, like: Array) -> None:
        """Give every replica the first one's noise."""
        del like  # not an empty body, of which TensorFlow's AutoGraph would warn

    def _draw(
        self,
        queries: Array,
        caches: Mapping[str, NegativeCache],
        batch: Positives,
        stand_in: Mapping[str, Array] | None,
        noise: Array | None,
    ) -> Retrieval:
        xp, replicas = self.backend.xp, self.replicas
        self.agree(caches, queries)
        sizes = self._sizes(queries, caches, batch)
        every, ids = self._gather((queries, batch.ids), sizes.rows)
        scores = self._scores(every, caches, ids, replicas.first(sizes.slots))
        found = self._draw_from_all(scores, noise, sizes)
        served = gather(
            caches,
            found.slots,
            found.scores > -float("inf"),
            self.embedding_key,
            self.data_keys,
            self.backend,
            self.item_keys,
        )
        rows = self._delivered(served, found)
        own_scores = xp.reshape(rows.pop("scores"), (-1, self.num_samples))
        drawn = own_scores > -float("inf")
        mean_score = xp.mean(xp.where(drawn, own_scores, 0.0), axis=1)
        usable = found.log_partition > -float("inf")
        others, bias = None, None
        if self.in_batch_negatives:
            items, bias = self._gather((batch.items, batch.bias), sizes.rows)
            first = replicas.first(sizes.rows)
            others = others_of(queries, batch.ids, every, items, first, xp=xp)
        pool = None
        if self.estimator != "paper":
            pool = self._pool(self._scores(queries, caches, batch.ids), rows, drawn, found, sizes)
        rows.pop("slot_of_all", None)
        return self._retrieval(
            {**rows, "slots": served["slots"], "owned": served["owned"]},
            stand_in,
            drawn=drawn,
            log_partition=found.log_partition,
            entropy=xp.where(usable, found.log_partition - mean_score, 0.0),
            fill=self._filled(caches, sizes, own_scores),
            pool=pool,
            readout=found.readout,
            others=others,
            positive_bias=bias,
            route=found.route,
        )

    def _sizes(
        self, queries: Array, caches: Mapping[str, NegativeCache], batch: Positives
    ) -> Sizes:
        ids = 0 if batch.ids is None else batch.ids.shape[1]
        capacities = [cache.age.shape[0] for cache in caches.values()]
        every = self.replicas.numbers([queries.shape[0], ids, *capacities], queries)
        if len({numbers[1] for numbers in every}) > 1:
            raise ShapeError(
                f"positive_ids have {[numbers[1] for numbers in every]} columns by rank: expected "
                "one number of them. Fill up short rows with an id that is there already."
            )
        return Sizes(
            tuple(numbers[0] for numbers in every), tuple(numbers[2:] for numbers in every)
        )

    def _gather(self, arrays: Sequence[Array | None], sizes: Sequence[int]) -> list[Any]:
        """Return arrays of all replicas; None stays None."""
        sent = [each for each in arrays if each is not None]
        found = iter(self.replicas.gather(sent, sizes) if sent else [])
        return [None if each is None else next(found) for each in arrays]

    def _draw_from_all(
        self, scores: list[CacheScores], noise: Array | None, sizes: Sizes
    ) -> ShardDraw:
        replicas, queries = self.replicas, scores[0].queries
        if noise is None:
            noise = self._noise_of_all(sizes.rows, queries)
        else:
            (noise,) = replicas.gather([noise], sizes.rows)
        readout = self.estimator == "exact_query"
        if self.top_k is None:
            return draw_from_shards(scores, noise, replicas, sizes.rows, readout=readout)
        check_groups(self.top_k, sum(sizes.slots))
        noise = replicas.own(noise, sizes.rows)
        return draw_from_shard_groups(
            scores, self.top_k, noise, replicas, sizes.rows, sizes.capacities
        )

    def _noise_of_all(self, rows: Sequence[int], like: Array) -> Array:
        """Return noise for the queries of all replicas, the same on each of them."""
        # Every replica makes all of it: there is one generator state in the whole job.
        return self.backend.uniform(self.generator, (sum(rows), self.num_samples, 2), like)

    def _delivered(self, served: Mapping[str, Any], found: ShardDraw) -> dict[str, Any]:
        """Send rows to those who drew them, and return the rows that this replica drew."""
        names = [name for name in served if name not in ("features", "slots", "owned")]
        fields = list(served["features"])
        sent = [*(served[name] for name in names), *(served["features"][key] for key in fields)]
        more = [found.scores] if found.slot_of_all is None else [found.scores, found.slot_of_all]
        rows = self.replicas.serve([*more, *sent], found.route)
        result = dict(zip(("scores", "slot_of_all")[: len(more)], rows, strict=False))
        rows = rows[len(more) :]
        result.update(zip(names, rows, strict=False))
        return {**result, "features": dict(zip(fields, rows[len(names) :], strict=True))}

    def _pool(
        self,
        scores: list[CacheScores],
        rows: Mapping[str, Array],
        drawn: Array,
        found: ShardDraw,
        sizes: Sizes,
    ) -> Pool:
        """Return what is known of all rows that all replicas drew."""
        xp, names = self.backend.xp, ["stale_embeddings", *self.item_keys]
        keys = [*names, "slot_of_all"] if "slot_of_all" in rows else names
        flat = xp.reshape(drawn, (-1,))
        *every, all_drawn = self._gather([*(rows[key] for key in keys), flat], found.route.sizes)
        known = dict(zip(keys, every, strict=True))
        capacity = sum(sizes.slots)
        slots = known.pop("slot_of_all", None)
        cross = cross_scores(scores, known, all_drawn, slots, found.candidates, capacity)

        def sum_logs(logs: Array) -> Array:
            (parts,) = self.replicas.gather([logs[None, :]], (1,) * self.replicas.count)
            return log_sum_exp(parts, 0, xp=xp)

        return pool_of(
            cross,
            found.log_partition,
            known["stale_embeddings"],
            self.num_samples,
            xp=xp,
            sum_logs=sum_logs,
        )

    def _filled(self, caches: Mapping[str, NegativeCache], sizes: Sizes, like: Array) -> Array:
        """Return the share of all replicas' slots that hold a row."""
        slots = sum(cache.age.shape[0] for cache in caches.values())
        written = filled(caches, like.dtype, self.backend.xp) * slots
        (every,) = self.replicas.gather([written[None]], (1,) * self.replicas.count)
        return self.backend.xp.sum(every) / sum(sizes.slots)

    def bring_home(
        self,
        cache: NegativeCache,
        key: str,
        new_items: Mapping[str, Array],
        mask: Array,
    ) -> tuple[dict[str, Array], Array]:
        """Exchange new rows and their mask, so that each comes to the replica that stores its item.

        key: the field that tells items apart, as a manager's unique_key
        """
        xp, replicas = self.backend.xp, self.replicas
        keys = cast(new_items[key], cache.data[key].dtype, xp)
        numbers = replicas.numbers([mask.shape[0], cache.age.shape[0]], mask)
        sizes, slots = zip(*numbers, strict=True)
        held, written = cache.data[key], is_written(cache.age)
        route = bring_home(keys, mask, held, written, replicas, sizes, slots, xp=xp)
        *rows, mask = replicas.give_back([*new_items.values(), mask], route)
        mine = take(route.owner, route.entries, xp) == replicas.rank
        return dict(zip(new_items, rows, strict=True)), mask & mine

    def _embedded(self, retrieval: Retrieval, *embeddings: Array | None) -> Embedded:
        queries, positives, drawn, hard = embeddings
        sizes = retrieval.route.sizes
        rows = tuple(size // self.num_samples for size in sizes)
        shares = retrieval.pool is not None
        # In this order everywhere, as the gradients travel back in the opposite one.
        return Embedded(
            queries,
            positives,
            drawn,
            hard,
            self.replicas.gather_fresh(positives, rows) if self.in_batch_negatives else None,
            self.replicas.gather_fresh(drawn, sizes) if shares else None,
        )

    def _refresh(self, retrieval: Retrieval, fresh: Array, finite: Array) -> dict[str, Any]:
        back = self.replicas.give_back([fresh, finite], retrieval.route)
        return super()._refresh(retrieval, *back)

    def _reduce(self, values: Array, retrieval: Retrieval) -> Array:
        if self.reducer is not mean:
            return super()._reduce(values, retrieval)
        xp, total = self.backend.xp, sum(retrieval.route.sizes) // self.num_samples
        return xp.sum(values) * (self.replicas.count / max(total, 1))


def init_shards(
    managers: Mapping[str, CacheManager], replicas: Replicas
) -> dict[str, NegativeCache]:
    """Return this replica's shard of each cache, empty.

    Raises CapacityError if a replica would have no slot.
    """
    shards = {}
    for name, manager in managers.items():
        sizes = shard_slots(manager.cache_size, replicas.count)
        if 0 in sizes:
            raise CapacityError(
                f"cache {name!r} of {manager.cache_size} slots leaves a replica of "
                f"{replicas.count} without any, {list(sizes)}: raise cache_size."
            )
        shards[name] = manager.init_shard(sizes[replicas.rank])
    return shards


def check_equal_shards(
    managers: Mapping[str, CacheManager], count: int, holder: str = "replica"
) -> None:
    """Raise CapacityError unless each cache can be cut into `count` shards of one size.

    holder: what holds a shard, in words
    """
    for name, manager in managers.items():
        if manager.cache_size % count:
            raise CapacityError(
                f"cache {name!r} of {manager.cache_size} slots cannot be cut into {count} equal "
                f"shards, one for each {holder}: choose a cache_size that is a multiple of {count}."
            )


def check_sharded(loss: ShardedLoss, handler: Any) -> None:
    """Refuse a handler's options that do not go with shards; tell the loss what must be alike."""
    if handler.use_cross_replica:
        raise OptionError(
            "use_cross_replica=True keeps a whole cache on every replica, and a "
            "DistributedCacheClassificationLoss cuts it into shards: choose one of the two."
        )
    if handler.group is not None and handler.group != getattr(loss, "group", None):
        raise OptionError("the handler and its loss have different groups: give both the same.")
    for name, manager in handler._managers.items():  # noqa: SLF001 - a handler's own part
        loss.facts[f"{name}.cache_size"] = manager.cache_size
        loss.facts[f"{name}.use_lru"] = manager.use_lru
        loss.facts[f"{name}.unique_key"] = manager.unique_key
    loss.facts["new_items_filter"] = handler.new_items_filter is not None
