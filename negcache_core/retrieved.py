"""Checks of a Retrieval that comes back for phase two, perhaps changed, or another loss's."""

from collections.abc import Iterator, Mapping
from typing import Any

from negcache_core._array import dtype_kind, dtype_name
from negcache_core.arguments import (
    array_of,
    check_device,
    check_keys,
    check_mapping,
    shape_of,
)
from negcache_core.backend import Backend
from negcache_core.errors import DTypeError, KindError, OptionError
from negcache_core.pool import Pool
from negcache_core.retrieval import Retrieval

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
                f"retrieval has {'no ' if here else ''}{name}, and this loss "
                f"{'needs it' if here else 'has no use for it'}: pass what this very loss's "
                "retrieve() returned."
            )
    stale = retrieval.stale_embeddings
    for parts in (_ends, _rows, _shared, _places):  # each may rely on those before
        for name, value, expected, kind in parts(retrieval):
            what = f"retrieval.{name}"
            if not hasattr(value, "dtype"):  # it is used as it is
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
    if retrieval.readout is not None:
        yield "readout", retrieval.readout, (rows, width), "floating"
    if retrieval.others is not None:
        yield "others", retrieval.others, (rows, "n"), "bool"


def _shared(retrieval: Retrieval) -> Iterator[Part]:
    if retrieval.positive_bias is not None and retrieval.others is not None:
        negatives = shape_of(retrieval.others, "retrieval.others")[1:]
        yield "positive_bias", retrieval.positive_bias, negatives, "floating"
    if retrieval.pool is not None:
        if not isinstance(retrieval.pool, Pool):
            raise KindError(f"retrieval.pool is a {type(retrieval.pool).__name__}: expected Pool.")
        stale, cross_scores, log_proposal = retrieval.pool
        width = shape_of(retrieval.stale_embeddings, "retrieval.stale_embeddings")[1]
        rows = shape_of(retrieval.drawn, "retrieval.drawn")[0]
        yield "pool.stale", stale, ("n", width), "floating"
        known = shape_of(stale, "retrieval.pool.stale")[0]
        yield "pool.cross_scores", cross_scores, (rows, known), "floating"
        yield "pool.log_proposal", log_proposal, (known,), "floating"


def _places(retrieval: Retrieval) -> Iterator[Part]:
    slots, owned = retrieval.slots, retrieval.owned
    if not isinstance(slots, Mapping):
        slots, owned = {"": slots}, {"": owned}
    check_keys(check_mapping(owned, "retrieval.owned"), slots, "retrieval.owned", exact=True)
    for name in slots:
        yield f"slots {name}".strip(), slots[name], ("m",), "integer"
        yield f"owned {name}".strip(), owned[name], ("m",), "bool"
