"""The batch's own positives: which items they are, and whose negatives they may be."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from negcache_core.arrays._array import Array, cast, dtype_kind, dtype_name, positions
from negcache_core.arrays.backend import Backend
from negcache_core.arrays.exclusion import Exclusions, Labels
from negcache_core.arrays.validation import (
    array_of,
    as_array,
    check_device,
    check_keys,
    check_shape,
    shape_of,
)
from negcache_core.cache.row_checks import check_castable
from negcache_core.cache.state import NegativeCache
from negcache_core.errors import DTypeError, KeysError, OptionError, ShapeError


class Positives(NamedTuple):
    """Facts about the positives of B queries.

    own:    what must not be a negative of each query; None for nothing
    labels: (B,) that decide whether a positive is a negative of another query
    bias:   (B,) subtracted from their scores as negatives, or None
    """

    own: Exclusions | None = None
    labels: Labels = Labels()
    bias: Array | None = None

    def under(self, ceiling: Array) -> "Positives":
        """Return these with a ceiling (B,); a row that scores above it is not a negative."""
        own = Exclusions() if self.own is None else self.own
        return self._replace(own=own._replace(ceiling=ceiling))


def positives_of(
    queries: Array,
    features: Mapping[str, Any] | None,
    positive_ids: Any,
    id_keys: tuple[str, ...],
    group_key: str | None,
    bias_key: str | None,
    caches: Mapping[str, NegativeCache],
    backend: Backend,
    *,
    in_batch: bool,
) -> Positives:
    """Check and collect the facts about positives; see `CacheClassificationLoss.retrieve`."""
    xp, rows = backend.xp, queries.shape[0]
    table = next(iter(caches.values())).data
    given: Mapping[str, Any] = {}
    if positive_ids is not None:
        given = _given_ids(positive_ids, id_keys)

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

    own: list[Any] = []
    items: list[Any] = []
    for key in id_keys:
        _check_field(table, key, "integer", "id_keys")
        if key not in given or in_batch:
            items.append(column(key))
        if key in given:
            what = "positive_ids" if given[key] is positive_ids else f"positive_ids[{key!r}]"
            ids = _ids(given[key], rows, table[key], what, backend)
        else:
            ids = items[-1][:, None]
        own.append(cast(ids, table[key].dtype, xp))
    group: Any = None
    bias: Any = None
    if group_key is not None:
        _check_field(table, group_key, "integer", "group_key")
        group = column(group_key)
    if bias_key is not None:
        _check_field(table, bias_key, "floating", "log_frequency_key")
        bias = column(bias_key) if in_batch else None
    labels = Labels(tuple(items), group) if in_batch else Labels()
    known = Exclusions(tuple(own), group) if own or group_key is not None else None
    return Positives(known, labels, bias)


class Others(NamedTuple):
    """All n positives of the batch, which are negatives of most of its B queries.

    place:  (B,) of each query's own positive among them
    labels: (n,) that decide whether a positive is a negative of another query
    """

    place: Array
    labels: Labels

    def among(self, usable: Array, own: Exclusions, scores: Array | None = None, *, xp: Any) -> Any:
        """Return bool (B, n): which of the positives are negatives of each query.

        usable: bool (n,), False for nobody's; own: what must not be a negative of each query
        scores: (B, n), to which its ceiling applies, if there is one
        """
        counts: Any = self.place[:, None] != positions(usable, xp)[None, :]
        counts = counts & usable[None, :]
        admitted = own.admit(self.labels.each(lambda field: field[None, :]), scores)
        return counts if admitted is None else counts & admitted


def _given_ids(positive_ids: Any, id_keys: tuple[str, ...]) -> Mapping[str, Any]:
    """Return `positive_ids` by key; a single array is for the first key."""
    if not id_keys:
        raise OptionError(
            "positive_ids were given to a loss without id_keys: name the cache's id fields."
        )
    if not isinstance(positive_ids, Mapping):
        return {id_keys[0]: positive_ids}
    check_keys(positive_ids, id_keys, "positive_ids", exact=False)
    return positive_ids


def _ids(positive_ids: Any, rows: Any, table: Array, what: str, backend: Backend) -> Array:
    advice = "The ids of each query's positives."
    if not hasattr(positive_ids, "shape"):
        positive_ids = as_array(positive_ids, what, backend)
    single = len(shape_of(positive_ids, what)) == 1
    ids = array_of(positive_ids, (rows,) if single else (rows, "P"), what, backend, advice)
    ids = check_device(ids[:, None] if single else ids, table, what, backend)
    if ids.shape[1] == 0:
        raise ShapeError(f"{what} has no columns: expected at least one id for each query.")
    if dtype_kind(ids.dtype) != "integer":
        raise DTypeError(f"{what} has dtype {dtype_name(ids.dtype)}: expected integers.")
    return ids


def _check_field(table: Mapping[str, Array], key: str, kind: str, what: str) -> None:
    check_shape(table[key], ("C",), f"field {key!r}", f"{what} needs one number for each row.")
    if dtype_kind(table[key].dtype) != kind:
        raise DTypeError(
            f"{what} names field {key!r} of {dtype_name(table[key].dtype)}: expected {kind} values."
        )
