"""The batch's own positives: which items they are, and whose negatives they may be."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from negcache_core.arrays._array import Array, cast, dtype_kind, dtype_name, positions
from negcache_core.arrays.backend import Backend
from negcache_core.arrays.numerics import is_among
from negcache_core.arrays.validation import array_of, as_array, check_device, check_shape, shape_of
from negcache_core.cache.row_checks import check_castable
from negcache_core.cache.state import NegativeCache
from negcache_core.errors import DTypeError, KeysError, OptionError, ShapeError


class Positives(NamedTuple):
    """What is known of the positives of B queries.

    ids:   (B, P) all items that are positives of a query; None without an id_key
    items: (B,) which item each query's own positive is, where that is needed; or None
    bias:  (B,) taken from their scores as negatives, or None
    """

    ids: Array | None
    items: Array | None
    bias: Array | None


def positives_of(
    queries: Array,
    features: Mapping[str, Any] | None,
    positive_ids: Any,
    id_key: str | None,
    bias_key: str | None,
    caches: Mapping[str, NegativeCache],
    backend: Backend,
    *,
    in_batch: bool,
) -> Positives:
    """Check and gather what is known of the positives; see `CacheClassificationLoss.retrieve`."""
    xp, rows = backend.xp, queries.shape[0]
    table = next(iter(caches.values())).data
    if positive_ids is not None and id_key is None:
        raise OptionError(
            "positive_ids were given to a loss without id_key: name the cache's field of ids."
        )

    def column(key: str) -> Array:
        if features is None or key not in features:
            raise KeysError(
                f"pos_features lack {key!r}: pass the field {key!r} of the batch's positives, (B,)."
            )
        what = f"pos_features[{key!r}]"
        array = array_of(features[key], (rows,), what, backend, "One for each query.")
        check_device(array, table[key], what, backend)
        check_castable(array.dtype, table[key].dtype, what)
        return cast(array, table[key].dtype, xp)

    own: Any = None
    items: Any = None
    bias: Any = None
    if id_key is not None:
        _check_field(table, id_key, "integer", "id_key")
        if positive_ids is None or in_batch:
            items = column(id_key)
        own = (
            items[:, None]
            if positive_ids is None
            else _ids(positive_ids, rows, table[id_key], backend)
        )
        own = cast(own, table[id_key].dtype, xp)
    if bias_key is not None:
        _check_field(table, bias_key, "floating", "log_frequency_key")
        bias = column(bias_key) if in_batch else None
    return Positives(own, items if in_batch else None, bias)


def others_of(
    queries: Array, own: Array | None, every: Array, items: Array | None, first: int, *, xp: Any
) -> Array:
    """Return bool (B, n): which of n positives are negatives of each query.

    queries: (B, D), whose own positives are the ones from `first` on; own: (B, P) ids, or None
    every:   (n, …), anything of all positives; items: (n,) their ids, or None
    """
    others = (positions(queries, xp) + first)[:, None] != positions(every, xp)[None, :]
    if items is None or own is None:
        return others
    return others & ~xp.matrix_transpose(is_among(items, own))


def _ids(positive_ids: Any, rows: Any, table: Array, backend: Backend) -> Array:
    what, advice = "positive_ids", "The ids of each query's positives."
    if not hasattr(positive_ids, "shape"):
        positive_ids = as_array(positive_ids, what, backend)
    single = len(shape_of(positive_ids, what)) == 1
    ids = array_of(positive_ids, (rows,) if single else (rows, "P"), what, backend, advice)
    ids = check_device(ids[:, None] if single else ids, table, what, backend)
    if ids.shape[1] == 0:
        raise ShapeError("positive_ids has no columns: expected one id or more for each query.")
    if dtype_kind(ids.dtype) != "integer":
        raise DTypeError(f"positive_ids has dtype {dtype_name(ids.dtype)}: expected integers.")
    return ids


def _check_field(table: Mapping[str, Array], key: str, kind: str, what: str) -> None:
    check_shape(table[key], ("C",), f"field {key!r}", f"{what} needs one number for each row.")
    if dtype_kind(table[key].dtype) != kind:
        raise DTypeError(
            f"{what} names field {key!r} of {dtype_name(table[key].dtype)}: expected {kind} values."
        )
