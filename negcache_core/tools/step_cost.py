"""The computed cost of a step on a sharded cache: memory, arithmetic, and bytes between ranks."""

from typing import Any, NamedTuple

from negcache_core.arrays.backend import ACCELERATOR_TILE
from negcache_core.arrays.validation import check_flag
from negcache_core.errors import CapacityError, DTypeError, KindError, OptionError
from negcache_core.losses.estimators import check_estimator
from negcache_core.retrieval.tiled_scores import BLOCK, tile_slots
from negcache_core.retrieval.top_k import check_groups, check_top_k
from negcache_core.tools.step_cost_report import Scaling

MOST = 2**63 - 1
"""No size is larger: what a signed 64-bit number holds."""


ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
"""Bytes of one number of the dtypes that towers may return."""


STORED = {**ITEMSIZE, "int8": 1}
"""Bytes of one number of the dtypes that a cache may store."""


ROW_SCALE = 4
"""Bytes of the scale of a row of int8."""


INTEGER = 8
"""Bytes of a count or a position: what is sent of them is int64."""


AGE = 4
"""Bytes of an age."""


def scaling(
    cache_size: int,
    width: int,
    *,
    batch_size: int,
    feature_bytes: int,
    world_size: int = 1,
    dtype: str = "float32",
    tower_dtype: str = "float32",
    num_samples: int = 1,
    estimator: str = "paper",
    in_batch_negatives: bool = False,
    top_k: int | None = None,
    id_bytes: int = 0,
    id_fields: int = 1,
    positives: int = 1,
    group_bytes: int = 0,
    margin: bool = False,
    log_frequency_bytes: int = 0,
    stored_bytes: int | None = None,
    tile_bytes: int = ACCELERATOR_TILE,
    draws_elsewhere: int | None = None,
) -> Scaling:
    """Estimate what a step on a cache in shards needs from each rank; nothing is allocated.

    cache_size:    C, slots of all shards together
    width:         D, of the embeddings
    batch_size:    B, queries of all ranks together, in equal parts
    feature_bytes: bytes of one item as the item network takes it: the fields of data_keys
    world_size:    the number of ranks
    dtype:         dtype in which the cache stores embeddings; rows of int8 have a scale each, and
                   travel between ranks in float32
    tower_dtype:   dtype that the towers return
    num_samples:   S, draws per query
    estimator:     that of the loss
    in_batch_negatives: that of the loss
    top_k:         that of the loss
    id_bytes:      bytes of an item's ids, all id_keys together; 0 without id_keys
    id_fields:     the number of id_keys
    positives:     the number of ids of each query, for each key
    group_bytes:   bytes of an item's group; 0 without a group_key
    margin:        whether the loss has a margin
    log_frequency_bytes: bytes of an item's log-frequency; 0 without a log_frequency_key
    stored_bytes:  bytes of one row without embedding and age; by default the fields named above
    tile_bytes:    that of the loss
    draws_elsewhere: how many of a rank's draws another rank's shard serves. By default all shards
                   are drawn from equally often: the share 1 - 1 / world_size of B S / world_size.

    An exchange in which each rank sends n bytes to all others counts n x (world_size - 1). The
    towers' gradients, which data-parallel training adds up, are not counted. The figures are the
    bytes that PyTorch's ranks send: `tests/core/tools/test_scale.py` counts those. Of work memory
    the largest arrays are counted, on paper; small ones, and what the towers take, come on top.

    Raises KindError, OptionError, DTypeError or CapacityError for an argument that cannot work.

    >>> one = scaling(1_000_000, 128, batch_size=1024, feature_bytes=256, dtype="bfloat16")
    >>> one.table_bytes, one.sent_bytes
    (516000000, 0)
    >>> four = scaling(
    ...     1_000_000, 128, batch_size=1024, feature_bytes=256, dtype="bfloat16", world_size=4
    ... )
    >>> four.table_bytes, four.sent["queries"], four.sent["weights"]
    (129000000, 393216, 12288)
    """
    _check_numbers(
        1,
        cache_size=cache_size,
        width=width,
        batch_size=batch_size,
        world_size=world_size,
        num_samples=num_samples,
        id_fields=id_fields,
        positives=positives,
        tile_bytes=tile_bytes,
    )
    _check_numbers(
        0,
        feature_bytes=feature_bytes,
        id_bytes=id_bytes,
        group_bytes=group_bytes,
        log_frequency_bytes=log_frequency_bytes,
        stored_bytes=0 if stored_bytes is None else stored_bytes,
        draws_elsewhere=0 if draws_elsewhere is None else draws_elsewhere,
    )
    check_estimator(
        estimator, transform=False, top_k=top_k is not None, retrieval_fn=False, correction=False
    )
    groups = check_top_k(top_k) or 0
    check_groups(groups, cache_size)
    longest = -(-cache_size // world_size)
    if longest * (world_size - 1) >= cache_size:  # the last shard's slots come after these
        raise CapacityError(
            f"cache_size {cache_size} leaves a rank of {world_size} without a slot: raise "
            "cache_size, or lower world_size."
        )
    if batch_size % world_size:
        raise OptionError(
            f"batch_size is {batch_size} and world_size {world_size}: expected equal parts. Give "
            "world_size times the largest part, for an upper bound."
        )
    stored = _itemsize(dtype, "dtype", STORED)
    fresh = _itemsize(tower_dtype, "tower_dtype", ITEMSIZE)
    coded = dtype == "int8"
    draws = batch_size * num_samples
    elsewhere = draws_elsewhere
    if elsewhere is None:
        elsewhere = round(draws // world_size * (world_size - 1) / world_size)
    if elsewhere > draws:
        raise OptionError(
            f"draws_elsewhere is {elsewhere} of {draws} draws in a step: expected at most that "
            "many."
        )
    step = _Step(
        slots=longest,
        width=width,
        queries=batch_size,
        draws=draws,
        ranks=world_size,
        elsewhere=elsewhere,
        stored=stored,
        sent=ITEMSIZE["float32"] if coded else stored,
        fresh=fresh,
        score=max(4, stored, fresh),
        features=feature_bytes,
        ids=id_bytes,
        id_fields=id_fields,
        positives=positives,
        group=group_bytes,
        margin=check_flag(margin, "margin"),
        bias=log_frequency_bytes,
        groups=groups,
        shares=estimator != "paper",
        readout=estimator == "exact_query",
        in_batch=check_flag(in_batch_negatives, "in_batch_negatives"),
    )
    fields = feature_bytes + id_bytes + group_bytes + log_frequency_bytes
    return Scaling(
        step.slots,
        {
            "embeddings": step.slots * (width * stored + coded * ROW_SCALE),
            "features": step.slots * (fields if stored_bytes is None else stored_bytes),
            "ages": step.slots * AGE,
        },
        _work(step, tile_bytes),
        _multiply_adds(step),
        _sent(step),
        world_size,
    )


class _Step(NamedTuple):
    """Sizes of a step: counts of all ranks, and bytes of one number, id or item."""

    slots: int
    width: int
    queries: int
    draws: int
    ranks: int
    elsewhere: int
    stored: int
    sent: int
    fresh: int
    score: int
    features: int
    ids: int
    id_fields: int
    positives: int
    group: int
    margin: bool
    bias: int
    groups: int
    shares: bool
    readout: bool
    in_batch: bool

    @property
    def own_queries(self) -> int:
        return self.queries // self.ranks

    @property
    def own_draws(self) -> int:
        return self.draws // self.ranks

    @property
    def blocks(self) -> int:
        return 0 if self.groups else -(-self.slots // BLOCK)


def _work(step: _Step, tile_bytes: int) -> dict[str, int]:
    copied = step.width if step.stored != step.score else 0
    tile = min(tile_slots(step.queries, copied, step.score, tile_bytes), step.slots)
    weights = step.queries * step.blocks
    # Assume that a rank serves as many draws as its own: a copy of their weights …
    served = step.own_draws * step.blocks * step.score
    # … summed up, and compared with the noise in a bool and an integer each; then the rows of the
    # block that each picked, and these in the dtype to score in.
    picked = BLOCK if step.blocks else 0
    compared = step.own_draws * step.blocks * (step.score + 1 + INTEGER)
    rows = step.own_draws * picked * (step.stored * step.width + step.score * copied)
    return {
        "block weights": weights * step.score,
        "tile": tile * step.score * (2 * step.queries + copied),
        "drawing": max(2 * weights * step.score, served + max(compared, rows)),
        "best of groups": step.queries * step.groups * (step.score + INTEGER),
        "scores of drawn rows": step.shares * step.own_queries * step.draws * step.score,
    }


def _multiply_adds(step: _Step) -> dict[str, int]:
    product = step.queries * step.slots * step.width
    own = step.own_queries * step.width
    return {
        "scores": product,
        "readout": step.readout * product,
        "drawn blocks": step.own_draws * (BLOCK if step.blocks else 0) * step.width,
        "scores of drawn rows": step.shares * own * step.draws,
        "scores of positives": step.in_batch * own * step.queries,
    }


def _sent(step: _Step) -> dict[str, int]:
    """Return the bytes of each exchange that takes place, in order."""
    queries, draws, score = step.own_queries, step.own_draws, step.score
    fresh, grouped = step.width * step.fresh, bool(step.groups)
    told = step.ids + step.group + step.bias
    known = step.width * step.sent + told
    own = step.positives * step.ids + step.group + step.margin * score
    slot = INTEGER * grouped
    in_batch, shares = step.in_batch, step.shares
    to_all = [
        ("sizes", True, (2 + step.id_fields) * INTEGER),
        ("queries", True, queries * (fresh + own)),
        ("weights", not grouped, step.queries * score),
        ("best scores", grouped, queries * step.groups * score),
        ("best slots", grouped, queries * step.groups * INTEGER),
        ("choices", grouped, draws * (score + INTEGER)),
        ("readout", step.readout, queries * step.width * score),
        ("drawn rows", True, 0),
        ("positives' ids", in_batch and told > 0, queries * told),
        ("all drawn rows", shares, draws * (known + slot + 1)),
        ("log proposals", shares, step.draws * score),
        ("fill", True, score),
        ("fresh positives", in_batch, queries * fresh),
        ("all fresh rows", shares, draws * fresh),
        ("fresh rows", True, 0),
        ("gradients of rows", shares, draws * fresh),
        ("gradients of positives", in_batch, queries * fresh),
    ]
    sent = {name: (step.ranks - 1) * size for name, wanted, size in to_all if wanted}
    sent["drawn rows"] = step.elsewhere * (score + slot + known + AGE + step.features)
    sent["fresh rows"] = step.elsewhere * (step.width * step.sent + 1)
    return sent


def _check_numbers(least: int, **numbers: Any) -> None:
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int):
            raise KindError(f"{name} is {number!r}: expected an int.")
        if number < least:
            raise OptionError(f"{name} is {number}: expected at least {least}.")
        if number > MOST:
            raise OptionError(f"{name} is {number}: expected at most {MOST}.")


def _itemsize(name: Any, what: str, known: dict[str, int]) -> int:
    if not isinstance(name, str) or name not in known:
        raise DTypeError(f"{what} is {name!r}: expected one of {sorted(known)}.")
    return known[name]
