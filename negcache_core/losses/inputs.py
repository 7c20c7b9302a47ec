"""The arguments of the loss, checked: once, before anything is drawn or embedded."""

from collections.abc import Mapping
from typing import Any

from negcache_core.arrays._array import Array, cast, dtype_kind, dtype_name
from negcache_core.arrays.backend import Backend
from negcache_core.arrays.exclusion import Labels
from negcache_core.arrays.validation import (
    array_of,
    check_device,
    check_floating,
    check_mapping,
    check_shape,
    embeddings_of,
    shape_of,
)
from negcache_core.cache.named import Caches
from negcache_core.cache.quantized import SUFFIX, check_not_named, scales_in
from negcache_core.cache.row_checks import check_castable, check_stand_in
from negcache_core.cache.widths import check_widths, table_of
from negcache_core.errors import DTypeError, KeysError, KindError, OptionError, ShapeError
from negcache_core.losses.nonfinite import Embedded
from negcache_core.retrieval.positives import Positives, positives_of
from negcache_core.retrieval.request import Wanted
from negcache_core.retrieval.result import Retrieval

Checked = tuple[Array, Positives, dict[str, Array] | None, Array | None, Array | None]


def check_request(
    query_embeddings: Any,
    caches: Caches,
    pos_features: Mapping[str, Any] | None,
    positive_ids: Any,
    pos_doc_embeddings: Any,
    noise: Any,
    wanted: Wanted,
    backend: Backend,
    *,
    scores_positives: bool,
) -> Checked:
    """Return the checked arguments of `retrieve`: queries, positives, features, noise, embeddings.

    scores_positives: whether the positives' embeddings (B, D) are needed, or may be None
    """
    cache = caches.first()
    table = cache.data[wanted.embedding_key]
    what = f"field {wanted.embedding_key!r}"
    check_shape(table, ("C", "D"), what, "Embeddings are vectors.")
    if table.shape[1] == 0:
        raise ShapeError(f"{what} has rows of width 0: expected a width D of at least 1.")
    if table.dtype == backend.xp.int8:
        _check_quantized(caches, wanted)
    else:
        check_floating(table, what)
    if wanted.prefixes is not None:
        wanted.prefixes.check(table.shape[1])
    try:
        queries = embeddings_of(
            query_embeddings, ("B", table.shape[1]), "query_embeddings", backend, like=table
        )
    except ShapeError:
        check_widths(table, wanted.embedding_key, {"query_embeddings": query_embeddings})
        raise
    if noise is not None:
        expected = (queries.shape[0], wanted.num_samples, 2)
        noise = array_of(noise, expected, "noise", backend, "Uniforms in [0, 1).")
        check_device(check_floating(noise, "noise"), table, "noise", backend)
    stand_in = None
    if pos_features is not None:
        stand_in = check_stand_in(pos_features, wanted.data_keys, cache, backend)
    batch = positives_of(
        queries,
        pos_features,
        positive_ids,
        wanted.id_keys,
        wanted.group_key,
        wanted.bias_key,
        caches,
        backend,
        in_batch=wanted.in_batch,
    )
    positives = None
    if scores_positives:
        if pos_doc_embeddings is None:
            raise OptionError(
                "margin compares a row's score with the positive's, but there are no positives: "
                "pass pos_doc_embeddings to the loss's retrieve(), or pos_item_embeddings to "
                "the handler's."
            )
        shape, what = (queries.shape[0], table.shape[1]), "pos_doc_embeddings"
        positives = embeddings_of(pos_doc_embeddings, shape, what, backend, like=table)
    return queries, batch, stand_in, noise, positives


def _check_quantized(caches: Caches, wanted: Wanted) -> None:
    """Raise unless every cache has scales for its int8 embeddings, which nothing else reads."""
    key = wanted.embedding_key
    if any(key not in scales_in(each.data) for each in caches.values()):
        raise DTypeError(
            f"field {key!r} is int8, but a cache has no scales for it: add FieldSpec((), "
            f"'float32') to its specs, named {key + SUFFIX!r}. A handler does so by itself."
        )
    check_not_named(wanted.fields[1:], caches.first().data, key)


def check_embeddings(
    retrieval: Retrieval,
    query_embeddings: Any,
    pos_doc_embeddings: Any,
    neg_doc_embeddings: Any,
    hard_negative_embeddings: Any,
    embedding_key: str,
    backend: Backend,
) -> Embedded:
    """Return the embeddings of phase two, in the shapes that the retrieval requires."""
    (rows, draws), like = retrieval.drawn.shape, retrieval.stale_embeddings
    total, width = None if rows is None else rows * draws, like.shape[1]
    output, hard = "the item network's output", None
    try:
        queries = embeddings_of(
            query_embeddings, (rows, width), "query_embeddings", backend, like=like
        )
        positives = embeddings_of(
            pos_doc_embeddings, (rows, width), "pos_doc_embeddings", backend, like=like
        )
        drawn = embeddings_of(neg_doc_embeddings, (total, width), output, backend, like=like)
        if hard_negative_embeddings is not None:
            what, expected = "hard_negative_embeddings", (rows, "H", width)
            hard = embeddings_of(hard_negative_embeddings, expected, what, backend, like=like)
    except ShapeError:
        given = {
            "query_embeddings": query_embeddings,
            "pos_doc_embeddings": pos_doc_embeddings,
            output: neg_doc_embeddings,
            "hard_negative_embeddings": hard_negative_embeddings,
        }
        check_widths(like, embedding_key, given)
        raise
    return Embedded(queries, positives, drawn, hard)


def check_hard_labels(
    features: Any,
    hard: Array | None,
    retrieval: Retrieval,
    id_keys: tuple[str, ...],
    group_key: str | None,
    backend: Backend,
) -> Labels | None:
    """Return the labels (B, H) of hard negatives (B, H, D), or None if they have none.

    Other fields of `features` are not read.
    """
    if hard is None:
        raise OptionError(
            "hard_negative_features were given without hard_negative_embeddings: pass both, or "
            "neither."
        )
    check_mapping(features, "hard_negative_features")
    keys = [key for key in (*id_keys, group_key) if key is not None]
    missing = [key for key in keys if key not in features]
    if missing:
        raise KeysError(
            f"hard_negative_features lack {missing}: expected an array (B, H) for each of "
            f"id_keys and group_key, {keys}. Without hard_negative_features all hard negatives "
            "count."
        )
    own = retrieval.own
    if own is None:
        return None
    told = [each for each in own.arrays() if each is not None]
    if len(told) != len(keys):
        raise OptionError(
            f"retrieval.own has {len(told)} fields of id_keys and group_key, but this loss has "
            f"{len(keys)}: pass what this loss's own retrieve() returned."
        )
    shape, found = tuple(hard.shape[:2]), []
    for key, like in zip(keys, told, strict=True):
        what = f"hard_negative_features[{key!r}]"
        array = array_of(features[key], shape, what, backend, "One for each hard negative.")
        check_device(array, like, what, backend)
        check_castable(array.dtype, like.dtype, what)
        found.append(cast(array, like.dtype, backend.xp))
    ids, group = found[: len(own.ids)], found[len(own.ids) :]
    return Labels(tuple(ids), group[0] if group else None)


def check_competing(
    scores: Any, retrieval: Retrieval, backend: Backend, *, of_widths: bool
) -> Array:
    """Return the scores (B, n) of what else competes with each query's positive.

    of_widths: whether the loss is a sum over widths
    """
    if of_widths:
        raise OptionError(
            "competing_scores were given to a loss with matryoshka_dims, which has a softmax "
            "for each width, but a score belongs to one width: pass these candidates as "
            "hard_negative_embeddings."
        )
    what, advice = "competing_scores", "One row for each query, -inf for no candidate."
    rows = retrieval.drawn.shape[0]
    array = array_of(scores, (rows, "n"), what, backend, advice)
    if dtype_kind(array.dtype) != "floating":
        raise DTypeError(
            f"competing_scores has dtype {dtype_name(array.dtype)}: expected floating scores, "
            "scale included."
        )
    return check_device(array, retrieval.stale_embeddings, what, backend)


def check_weight(sample_weight: Any, retrieval: Retrieval, dtype: Any, backend: Backend) -> Any:
    """Return the weights (B,) of the queries in `dtype`, or None."""
    if sample_weight is None:
        return None
    what, advice = "sample_weight", "One factor for each query."
    rows = retrieval.drawn.shape[0]
    weight = array_of(sample_weight, (rows,), what, backend, advice)
    check_device(weight, retrieval.stale_embeddings, what, backend)
    if dtype_kind(weight.dtype) not in {"floating", "integer", "bool"}:
        raise DTypeError(
            f"sample_weight has dtype {dtype_name(weight.dtype)}: expected floating factors."
        )
    return cast(weight, dtype, backend.xp)


def check_pairs(
    query_embeddings: Any, pos_doc_embeddings: Any, cache: Any, embedding_key: str
) -> None:
    """Raise unless there is one positive for each query, before anything is drawn.

    cache: as the user passed it; only the width of its rows is read, without a check
    """
    for what, array in (
        ("query_embeddings", query_embeddings),
        ("pos_doc_embeddings", pos_doc_embeddings),
    ):
        if not hasattr(array, "shape") or not hasattr(array, "dtype"):
            raise KindError(f"{what} is a {type(array).__name__}: expected an array (B, D).")
    queries = shape_of(query_embeddings, "query_embeddings")
    sound = isinstance(cache, Caches)
    table = cache.first().data[embedding_key] if sound else table_of(cache, embedding_key)
    known = hasattr(table, "shape") and tuple(table.shape[1:]) == queries[1:]
    if known and shape_of(pos_doc_embeddings, "pos_doc_embeddings") == queries:
        return
    given = {"query_embeddings": query_embeddings, "pos_doc_embeddings": pos_doc_embeddings}
    check_widths(table, embedding_key, given)
    positives = check_shape(pos_doc_embeddings, ("B", *queries[1:]), "pos_doc_embeddings").shape
    if queries and None not in (queries[0], positives[0]) and queries[0] != positives[0]:
        raise ShapeError(
            f"query_embeddings has {queries[0]} rows and pos_doc_embeddings {positives[0]}: "
            "expected one positive item for each query."
        )
