"""What phase one returns, and the check of one that comes back for phase two."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from negcache_core.arrays._array import Array, dtype_kind, dtype_name
from negcache_core.arrays.backend import Backend
from negcache_core.arrays.exclusion import Exclusions, Labels
from negcache_core.arrays.validation import (
    array_of,
    check_device,
    check_keys,
    check_mapping,
    shape_of,
)
from negcache_core.errors import DTypeError, KindError, OptionError
from negcache_core.retrieval.positives import Others
from negcache_core.retrieval.proposal import CrossScores, Pool


class Retrieval(NamedTuple):
    """The negatives drawn for B queries, S each. All are constants; n = B * S rows, query by query.

    features:         field -> (n, …), what to put through the item network
    drawn:            bool (B, S), False where no slot was usable and a stand-in is in the row
    log_partition:    (B,) log-sum-exp of the stale scores over usable slots; -inf for none
    entropy:          (B,) of the softmax, in nats: log_partition minus the mean of the drawn
                      scores, an unbiased estimate (exact with a retrieval_fn or top_k)
    stale_embeddings: (n, D), as the cache holds them; zeros where `drawn` is False
    ages:             int32 (n,), the ages of the drawn rows
    fill:             scalar, the share of slots that hold a row
    slots:            (n,) integers, the slot of each row; a dict of these by name for a dict of
                      caches
    owned:            bool (n,), whether a row was drawn and is this cache's; a dict like `slots`
    route:            where the rows came from, if the cache is cut into shards; `slots` and `owned`
                      are then about the (m,) draws that this replica served
    pool:             what is known of all drawn rows; None unless the estimator shares them
    readout:          (B, D) mean embedding under each query's softmax; None unless it is needed
    others:           how to tell which of the batch's positives are negatives of a query; None
                      unless they are needed
    positive_bias:    (B,) what is subtracted from the scores of the batch's positives as negatives,
                      or None
    own:              the ids that must not, and the group that must, agree with each query; None
                      for a loss without id_keys and group_key
    window:           scalar, the age in steps up to which rows compete; None for every age
    by_width:         (B, W) with matryoshka_dims: the log_partition at each width, ascending;
                      log_partition is then that of the last width, and readout is (B, w)
    """

    features: dict[str, Any]
    drawn: Array
    log_partition: Array
    entropy: Array
    stale_embeddings: Any
    ages: Array
    fill: Array
    slots: Any
    owned: Any
    route: Any = None
    pool: Pool | None = None
    readout: Array | None = None
    others: Others | None = None
    positive_bias: Array | None = None
    own: Exclusions | None = None
    window: Array | None = None
    by_width: Array | None = None


Part = tuple[str, Any, tuple[Any, ...], str]  # name, value, expected shape, kind of dtype


def check_retrieval(retrieval: Any, backend: Backend, **wanted: bool) -> Retrieval:
    """Raise unless `retrieval` is what this loss's `retrieve` returns, as far as shapes tell.

    wanted: name of a field -> whether this loss has it
    """
    if not isinstance(retrieval, Retrieval):
        raise KindError(
            f"retrieval is a {type(retrieval).__name__}: expected what retrieve() returned."
        )
    for name, here in wanted.items():
        if (getattr(retrieval, name) is not None) != here:
            raise OptionError(
                f"retrieval has {'no ' if here else ''}{name}, but this loss "
                f"{'needs it' if here else 'has no use for it'}: pass what this loss's own "
                "retrieve() returned."
            )
    stale = retrieval.stale_embeddings
    for parts in (_ends, _rows, _others, _batch, _pool, _places):  # each may rely on those before
        for name, value, expected, kind in parts(retrieval):
            what = f"retrieval.{name}"
            if not hasattr(value, "dtype"):  # it is used unchanged
                raise KindError(f"{what} is a {type(value).__name__}: expected retrieve()'s array.")
            array = array_of(value, expected, what, backend)
            if dtype_kind(array.dtype) != kind:
                raise DTypeError(
                    f"{what} has dtype {dtype_name(array.dtype)}: expected {kind} values."
                )
            check_device(array, stale, what, backend)
    return retrieval


def _ends(retrieval: Retrieval) -> Iterator[Part]:
    yield "stale_embeddings", retrieval.stale_embeddings, ("n", "D"), "floating"
    yield "drawn", retrieval.drawn, ("B", "S"), "bool"


def _rows(retrieval: Retrieval) -> Iterator[Part]:
    rows, draws = shape_of(retrieval.drawn, "retrieval.drawn")
    width = shape_of(retrieval.stale_embeddings, "retrieval.stale_embeddings")[1]
    total = None if rows is None else rows * draws
    yield "stale_embeddings", retrieval.stale_embeddings, (total, width), "floating"
    yield "log_partition", retrieval.log_partition, (rows,), "floating"
    yield "entropy", retrieval.entropy, (rows,), "floating"
    yield "ages", retrieval.ages, (total,), "integer"
    yield "fill", retrieval.fill, (), "floating"
    if retrieval.by_width is not None:
        yield "by_width", retrieval.by_width, (rows, "W"), "floating"
        width = "w"
    if retrieval.readout is not None:
        yield "readout", retrieval.readout, (rows, width), "floating"


def _others(retrieval: Retrieval) -> Iterator[Part]:
    if retrieval.others is None:
        return
    rows = shape_of(retrieval.drawn, "retrieval.drawn")[0]
    if not isinstance(retrieval.others, Others):
        raise KindError(
            f"retrieval.others is a {type(retrieval.others).__name__}: expected retrieve()'s "
            "record."
        )
    place, labels = retrieval.others
    if not isinstance(labels, Labels):
        raise KindError(
            f"retrieval.others.labels is a {type(labels).__name__}: expected retrieve()'s record."
        )
    yield "others.place", place, (rows,), "integer"
    for ids in labels.arrays():
        if ids is not None:
            yield "others.labels", ids, ("n",), "integer"
    if retrieval.positive_bias is not None:
        yield "positive_bias", retrieval.positive_bias, ("n",), "floating"


def _batch(retrieval: Retrieval) -> Iterator[Part]:
    rows = shape_of(retrieval.drawn, "retrieval.drawn")[0]
    if retrieval.own is not None:
        if not isinstance(retrieval.own, Exclusions):
            raise KindError(
                f"retrieval.own is a {type(retrieval.own).__name__}: expected retrieve()'s record."
            )
        for ids in retrieval.own.ids:
            yield "own.ids", ids, (rows, "P"), "integer"
        if retrieval.own.group is not None:
            yield "own.group", retrieval.own.group, (rows,), "integer"


def _pool(retrieval: Retrieval) -> Iterator[Part]:
    if retrieval.pool is not None:
        if not isinstance(retrieval.pool, Pool):
            raise KindError(f"retrieval.pool is a {type(retrieval.pool).__name__}: expected Pool.")
        stale, cross_scores, log_proposal = retrieval.pool
        rows = shape_of(retrieval.drawn, "retrieval.drawn")[0]
        width = shape_of(retrieval.stale_embeddings, "retrieval.stale_embeddings")[1]
        yield "pool.stale", stale, ("n", width), "floating"
        known = shape_of(stale, "retrieval.pool.stale")[0]
        if isinstance(cross_scores, CrossScores):
            size = width if retrieval.by_width is None else "D + W"
            yield "pool.cross_scores.queries", cross_scores.queries, (rows, size), "floating"
            yield "pool.cross_scores.drawn", cross_scores.drawn, (known,), "bool"
        else:
            size = (known,) if retrieval.by_width is None else ("W", known)
            yield "pool.cross_scores", cross_scores, (rows, *size), "floating"
        yield "pool.log_proposal", log_proposal, (known,), "floating"


def _places(retrieval: Retrieval) -> Iterator[Part]:
    slots, owned = retrieval.slots, retrieval.owned
    if not isinstance(slots, Mapping):
        slots, owned = {"": slots}, {"": owned}
    check_keys(check_mapping(owned, "retrieval.owned"), slots, "retrieval.owned", exact=True)
    for name in slots:
        yield f"slots {name}".strip(), slots[name], ("m",), "integer"
        yield f"owned {name}".strip(), owned[name], ("m",), "bool"
