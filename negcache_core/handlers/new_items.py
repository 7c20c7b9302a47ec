"""The rows that a step or a prefill inserts: checked, and left out if they must not enter."""

from collections.abc import Mapping
from typing import Any

from negcache_core.arrays._array import Array, cast
from negcache_core.arrays.numerics import finite_rows
from negcache_core.arrays.validation import check_keys, check_mapping, embeddings_of, in_order
from negcache_core.cache.named import SINGLE, Caches
from negcache_core.cache.quantized import scales_in
from negcache_core.cache.row_checks import (
    CheckedRows,
    NewRows,
    check_mask,
    check_new_rows,
    check_rows,
)
from negcache_core.cache.state import NegativeCache
from negcache_core.cache.widths import check_widths
from negcache_core.errors import DTypeError, KeysError, ShapeError
from negcache_core.handlers.setup import Setup


def check_batch(
    setup: Setup,
    caches: Caches,
    embeddings: Mapping[str, Array],
    features: Mapping[str, Mapping[str, Array]],
    queries: Array | None = None,
) -> dict[str, NewRows]:
    """Return the new rows of each cache; refuse a batch with bad keys, shapes or dtypes.

    queries: (B, D), whose width shows which of two other widths is wrong
    """
    for what, given in (("new_item_embeddings", embeddings), ("new_item_features", features)):
        check_keys(check_mapping(given, what), caches, what, exact=True)
    return {
        name: new_rows(setup, name, cache, embeddings[name], features[name], queries)
        for name, cache in caches.items()
    }


def new_rows(
    setup: Setup,
    name: str,
    cache: NegativeCache,
    embeddings: Array,
    features: Mapping[str, Array],
    queries: Array | None,
) -> NewRows:
    """Return the rows to insert, checked: one array for each field of the cache."""
    key = setup.embedding_key
    given = {key: embeddings, **stored_features(setup, cache, features)}
    try:
        new = check_new_rows(given, cache, setup.backend)
    except (ShapeError, DTypeError):  # name the argument, not the field
        what = "pos_item_embeddings" if name == SINGLE else f"new_item_embeddings[{name!r}]"
        check_widths(cache.data[key], key, {what: embeddings, "query_embeddings": queries})
        embeddings_of(embeddings, ("n", cache.data[key].shape[1]), what, setup.backend)
        raise
    new.rows[setup.embedding_key] = setup.backend.stop_gradient(new.rows[setup.embedding_key])
    return new


def stored_features(
    setup: Setup, cache: NegativeCache, features: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the `features` that the cache stores: all its fields except the embedding."""
    check_mapping(features, "features")
    own = (setup.embedding_key, scales_in(cache.data).get(setup.embedding_key))
    wanted = [key for key in cache.data if key not in own]
    missing = [key for key in wanted if key not in features]
    if missing:
        raise KeysError(
            f"features lack {missing}: the cache stores {wanted} of each item, but features have "
            f"{in_order(features)}."
        )
    return {key: features[key] for key in wanted}


def with_labels(features: Mapping[str, Any], labels: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Return features and labels as one mapping; no field may be in both."""
    if labels is None:
        return features
    check_mapping(features, "features")
    both = in_order(set(features) & set(check_mapping(labels, "labels")))
    if both:
        raise KeysError(f"features and labels both have {both}: give each field once.")
    return {**features, **labels}


def entering(setup: Setup, cache: NegativeCache, rows: CheckedRows) -> Array:
    """Return which rows enter: those with a finite embedding that pass the filter."""
    embeddings = rows[setup.embedding_key]
    mask = finite_as_stored(setup, cache, embeddings)
    if setup.new_items_filter is not None:
        what, found = "what new_items_filter returned", setup.new_items_filter(cache, rows)
        passed = check_mask(found, embeddings.shape[0], what, setup.backend, like=cache.age)
        mask = mask if passed is None else mask & passed
    return mask


def finite_as_stored(setup: Setup, cache: NegativeCache, embeddings: Array) -> Any:
    """Return bool (n,): which of (n, D) are finite in the dtype that the cache stores."""
    xp, stored = setup.backend.xp, cache.data[setup.embedding_key].dtype
    stored = xp.float32 if stored == xp.int8 else stored  # codes hold any finite row
    return finite_rows(cast(embeddings, stored, xp), xp=xp)


def stand_in(
    setup: Setup, caches: Caches, features: Mapping[str, Mapping[str, Array]]
) -> CheckedRows | None:
    """Return what the loss needs of the positives: the first cache's, or the first that has any.

    Queries without a usable slot get them instead.
    """
    rows, keys = None, (*setup.data_keys, *setup.item_keys)
    check_keys(check_mapping(features, "features"), caches, "features", exact=False)
    for name in sorted(features):
        missing = [key for key in keys if key not in check_mapping(features[name], "features")]
        if missing:
            raise KeysError(
                f"features lack {missing}: the loss needs {list(keys)} of each positive, but "
                f"features have {in_order(features[name])}."
            )
        given = {key: features[name][key] for key in keys}
        arrays, count = check_rows(given, caches[name], "features", setup.backend)
        rows = CheckedRows(arrays)
        if not isinstance(count, int) or count:
            break
    return rows


def stand_in_of(new: Mapping[str, NewRows]) -> CheckedRows:
    """Return what `stand_in` does, from checked rows: those of the first cache that has any."""
    for each in new.values():
        if not isinstance(each.count, int) or each.count:
            return each.rows
    return next(iter(new.values())).rows
