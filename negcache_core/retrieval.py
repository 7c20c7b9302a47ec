"""Phase one of a step: score the cache, draw negatives, and gather what the encoder needs.

Everything here is integers and constants; nothing is differentiated. Several named caches are
treated as one, in sorted order of their names.
"""

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from negcache_core._array import (
    Array,
    cast,
    dtype_name,
    length,
    mask_rows,
    positions,
    take,
    take_columns,
)
from negcache_core.arguments import (
    check_device,
    shape_of,
)
from negcache_core.backend import Backend
from negcache_core.errors import KeysError, ShapeError
from negcache_core.functions import choice
from negcache_core.pool import Pool
from negcache_core.sampling import draw_from_softmax
from negcache_core.scoring import Scorer, log_sum_exp
from negcache_core.state import NegativeCache, check_cache, is_written
from negcache_core.streaming import (
    CacheScores,
    best_of_all_groups,
    draw_from_caches,
    tile_slots,
)
from negcache_core.topk import check_groups

SINGLE = "cache"  # the name a cache goes by where the caller gave it none


class Retrieval(NamedTuple):
    """The negatives drawn for B queries, S each: constants, n = B * S rows, query-major.

    features:         field -> (n, …), what to put through the item network
    drawn:            bool (B, S); False where no slot was usable and a stand-in is in the row
    log_partition:    (B,) log-sum-exp of the stale scores over usable slots, -inf for none
    entropy:          (B,) of the softmax, in nats: log_partition minus the drawn scores' mean, an
                      unbiased estimate (exact with a retrieval_fn or top_k)
    stale_embeddings: (n, D) as the cache holds them
    ages:             int32 (n,)
    fill:             scalar, the share of slots that hold a row
    slots, owned:     (n,) the slot in its cache, and whether it is that cache's row and was drawn;
                      a dict of these by name where a dict of caches was given
    route:            where the rows came from, if the cache is cut into shards; `slots` and `owned`
                      are then about the (m,) draws that this replica served
    pool:             what is known of all drawn rows; None unless the estimator shares them
    readout:          (B, D) mean embedding under each query's softmax; None unless it is wanted
    others:           bool (B, B), which of the batch's other positives are negatives of a query;
                      None unless they are wanted
    positive_bias:    (B,) taken from the scores of the batch's positives as negatives, or None
    """

    features: dict[str, Array]
    drawn: Array
    log_partition: Array
    entropy: Array
    stale_embeddings: Array
    ages: Array
    fill: Array
    slots: Any
    owned: Any
    route: Any = None
    pool: Pool | None = None
    readout: Array | None = None
    others: Array | None = None
    positive_bias: Array | None = None


def named_caches(cache: Any, fields: tuple[str, ...], backend: Backend) -> dict[str, NegativeCache]:
    """Return caches by sorted name; check that each has `fields`, of one shape and dtype."""
    single = isinstance(cache, NegativeCache) or not isinstance(cache, Mapping)
    given = {SINGLE: cache} if single else dict(cache)
    if not given:
        raise KeysError("cache is an empty dict: expected at least one NegativeCache.")
    for name in given:
        if not isinstance(name, str):
            raise KeysError(f"cache has key {name!r}: the names of caches are strings.")
    caches = {name: check_cache(given[name], backend, f"cache {name!r}") for name in sorted(given)}
    first = next(iter(caches.values()))
    for name, each in caches.items():
        missing = [key for key in fields if key not in each.data]
        if missing:
            raise KeysError(
                f"cache {name!r} lacks {missing} of embedding_key and data_keys {list(fields)}: it "
                f"has {sorted(each.data)}. Add the field to its specs, or correct the keys."
            )
        for key in fields:
            own, other = (cache.data[key] for cache in (each, first))
            if shape_of(own, key)[1:] != shape_of(other, key)[1:] or own.dtype != other.dtype:
                raise ShapeError(
                    f"field {key!r} of cache {name!r} has row shape {tuple(own.shape)[1:]} and "
                    f"dtype {own.dtype}, elsewhere {tuple(other.shape)[1:]} and {other.dtype}: "
                    "caches that are treated as one need equal fields."
                )
        if each.age.shape[0] is None:
            raise ShapeError(f"cache {name!r} has an unknown capacity: set its static shape.")
        check_device(each.age, first.age, f"cache {name!r}", backend)
    return caches


def scores_of(
    queries: Array,
    caches: Mapping[str, NegativeCache],
    embedding_key: str,
    scorer: Scorer,
    backend: Backend,
    tile_bytes: int | None,
    *,
    id_key: str | None = None,
    positive_ids: Array | None = None,
    bias_key: str | None = None,
    first: int = 0,
) -> list[CacheScores]:
    """Return the scores of queries (B, D) against each cache, none of them computed yet.

    first: the number of the first slot of all
    """
    xp = backend.xp
    itemsize = 8 if dtype_name(scorer.dtype) == "float64" else 4
    budget = backend.tile_bytes(queries) if tile_bytes is None else tile_bytes
    # The scale goes into the queries: B x D products instead of one for each score. Stopped, as a
    # tape that watches the scale would otherwise keep every tile.
    scaled, plain = backend.stop_gradient(scorer.scaled(queries)), scorer._replace(scale=None)
    found = []
    for cache in caches.values():
        table, age = cache.data[embedding_key], cache.age
        copied = backend.slices_copy or table.dtype != scorer.dtype
        width = table.shape[1] if copied else 0
        tile = tile_slots(backend.tile_rows(queries), width, itemsize, budget)
        ids = None if id_key is None else cache.data[id_key]
        own = None if ids is None else cast(positive_ids, ids.dtype, xp)
        bias = None if bias_key is None else cast(cache.data[bias_key], scorer.dtype, xp)
        found.append(CacheScores(scaled, table, age, first, tile, plain, backend, ids, own, bias))
        first += found[-1].slots
    return found


def filled(caches: Mapping[str, NegativeCache], dtype: Any, xp: Any) -> Array:
    """Return the share of all slots that hold a row."""
    written = [xp.sum(cast(is_written(cache.age), dtype, xp)) for cache in caches.values()]
    total = sum(cache.age.shape[0] for cache in caches.values())
    return functools.reduce(operator.add, written) / total


class Draw(NamedTuple):
    """Slots (B, S) over all caches; drawn (B, S); log_partition (B,); entropy (B,).

    readout (B, D), where it was wanted; candidates (B, k), the best slot of each top-k group
    """

    slots: Array
    drawn: Array
    log_partition: Array
    entropy: Array
    readout: Array | None = None
    candidates: Array | None = None


def draw(
    caches: Sequence[CacheScores],
    *,
    noise: Array | None,
    retrieval_fn: Callable[[Array], Array] | None,
    top_k: int | None,
    readout: bool,
    backend: Backend,
) -> Draw:
    """Draw slots.

    Without `retrieval_fn` the draw is from the softmax, driven by `noise`; the score matrix (with
    top_k: of the groups' best) is made for a user's function alone. A slot that such a function
    chooses outside of the matrix counts as not drawn.
    """
    xp, columns, mean = backend.xp, None, None
    if top_k is None and retrieval_fn is None:
        slots, scores, log_partition, mean = draw_from_caches(caches, noise, readout=readout)
        drawn, mean_score = scores > -float("inf"), xp.mean(scores, axis=1)
    else:
        if top_k is None:
            matrix = xp.concat([cache.matrix() for cache in caches], axis=1)
        else:
            check_groups(top_k, sum(cache.slots for cache in caches))
            matrix, columns = best_of_all_groups(caches, top_k)
        if retrieval_fn is None:
            slots, log_partition = draw_from_softmax(matrix, noise, xp=xp)
        else:
            slots = choice(retrieval_fn(matrix), matrix.shape[0], backend)
            log_partition = log_sum_exp(matrix, xp=xp)
        inside = (slots >= 0) & (slots < matrix.shape[1])
        slots = xp.where(inside, slots, 0)
        scores = take_columns(matrix, slots, xp)
        drawn = inside & (scores > -float("inf"))
        slots = slots if columns is None else take_columns(columns, slots, xp)
        # The whole law is at hand here, so the entropy can be exact.
        law = xp.exp(matrix - xp.where(log_partition > -float("inf"), log_partition, 0.0)[:, None])
        mean_score = xp.sum(law * xp.where(matrix > -float("inf"), matrix, 0.0), axis=1)
    entropy = xp.where(log_partition > -float("inf"), log_partition - mean_score, 0.0)
    return Draw(slots, drawn, log_partition, entropy, mean, columns)


def gather(
    caches: Mapping[str, NegativeCache],
    slots: Array,
    drawn: Array,
    embedding_key: str,
    data_keys: tuple[str, ...],
    backend: Backend,
    more: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Copy the drawn rows out of the caches: the row-wise fields of a Retrieval.

    slots, drawn: of the same shape; slots over all caches
    more:         name in the result -> field, for further fields
    """
    xp = backend.xp
    every, drawn = (xp.reshape(array, (-1,)) for array in (slots, drawn))
    start, places, mine = 0, {}, {}
    for name, cache in caches.items():
        capacity = cache.age.shape[0]
        mine[name] = (every >= start) & (every < start + capacity)
        places[name] = xp.where(mine[name], every - start, 0)
        start += capacity

    def rows_of(pick: Callable[[NegativeCache], Array]) -> Array:
        result = None
        for name, cache in caches.items():
            rows = take(pick(cache), places[name], xp)
            result = rows if result is None else xp.where(mask_rows(mine[name], rows), rows, result)
        return result

    def field(key: str) -> Array:
        return rows_of(lambda cache: cache.data[key])

    return {
        "features": {key: field(key) for key in data_keys},
        "stale_embeddings": field(embedding_key),
        "ages": rows_of(lambda cache: cache.age),
        **{name: field(key) for name, key in (more or {}).items()},
        "slots": places,
        "owned": {name: mask & drawn for name, mask in mine.items()},
    }


def with_stand_ins(
    features: Mapping[str, Array], drawn: Array, stand_in: Mapping[str, Array] | None, xp: Any
) -> dict[str, Array]:
    """Return features (n, …) of drawn rows, with those of `stand_in` where `drawn` (B, S) is False.

    So an encoder never sees the zeros of a slot that was not written.
    """
    if stand_in is None:
        return dict(features)
    count = length(next(iter(stand_in.values())), xp)
    flat = xp.reshape(drawn, (-1,))
    row = positions(flat, xp) // drawn.shape[1] % count
    return {
        key: xp.where(mask_rows(flat, rows), rows, take(stand_in[key], row, xp))
        for key, rows in features.items()
    }
