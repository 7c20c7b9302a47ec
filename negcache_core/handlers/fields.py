"""The fields of a cache, read from an example batch, so nobody spells out shapes and dtypes."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from negcache_core.arrays._array import dtype_name
from negcache_core.arrays.backend import Backend
from negcache_core.arrays.validation import as_array, as_whole, check_mapping, in_order, shape_of
from negcache_core.cache.quantized import SUFFIX, stores_embeddings
from negcache_core.cache.specs import FieldSpec, as_field_spec
from negcache_core.errors import DTypeError, KeysError, KindError, ShapeError

EMBEDDING = "embedding"
"""The name of the embedding's field, unless the user has one of that name."""


class Fields(NamedTuple):
    """The specs of a cache, and the names of its embedding field and the item network's fields."""

    specs: dict[str, FieldSpec]
    embedding_key: str
    data_keys: tuple[str, ...]


def fields_of(
    features: Mapping[str, Any],
    embedding: Any,
    labels: Mapping[str, Any] | None,
    backend: Backend,
) -> Fields:
    """Return the fields of an example batch; see NegativeCacheLoss for the arguments."""
    given = dict(check_mapping(features, "features"))
    if not given:
        raise KeysError("features is empty: expected the arrays that the item network takes.")
    beside = {} if labels is None else dict(check_mapping(labels, "labels"))
    both = in_order(set(given) & set(beside))
    if both:
        raise KeysError(
            f"features and labels both have {both}: name each field once. Labels are stored with "
            "the features, but the item network does not get them."
        )
    sizes: dict[str, Any] = {}
    specs = {
        key: _spec(key, value, what, sizes, backend)
        for what, group in (("features", given), ("labels", beside))
        for key, value in group.items()
    }
    row = _embedding_spec(embedding, sizes, backend)
    if len(set(sizes.values())) > 1:
        raise ShapeError(
            f"the example batch has row counts {sizes}: expected one row of every field, and one "
            "embedding, for each item."
        )
    key = EMBEDDING
    while key in specs or key + SUFFIX in specs:  # the second may hold its scales
        key = f"item_{key}"
    return Fields({**specs, key: row}, key, tuple(given))


def _spec(key: Any, value: Any, what: str, sizes: dict[str, Any], backend: Backend) -> FieldSpec:
    """Return the spec of one field, and note an example's number of rows in `sizes`."""
    if not isinstance(key, str) or not key:
        raise KeysError(f"{what} has key {key!r}: field names are non-empty strings.")
    if not _is_example(value, backend):
        if not (hasattr(value, "shape") and hasattr(value, "dtype")):
            raise KindError(
                f"{what}[{key!r}] is a {type(value).__name__}: expected an example array (B, …), "
                "or FieldSpec(shape, dtype) of one row."
            )
        return as_field_spec(key, value)
    array = as_array(value, f"{what}[{key!r}]", backend)
    shape = shape_of(array, f"{what}[{key!r}]")
    if not shape:
        raise ShapeError(
            f"{what}[{key!r}] has shape (): expected an example batch, (B, …), with a row for each "
            "item."
        )
    if shape[0] is not None:
        sizes[key] = shape[0]
    return as_field_spec(key, FieldSpec(shape[1:], array.dtype))


def _embedding_spec(value: Any, sizes: dict[str, Any], backend: Backend) -> FieldSpec:
    """Return the spec of the embedding: of an example (B, D), of a spec, or of D alone."""
    width = as_whole(value)
    if width is not None and getattr(value, "shape", ()) == ():
        if width < 1:
            raise ShapeError(f"embedding is {value}: expected a width D of at least 1.")
        return FieldSpec((width,), "float32")
    spec = _spec(EMBEDDING, value, "example", sizes, backend)
    if len(spec.shape) != 1:
        raise ShapeError(
            f"embedding has rows of shape {spec.shape}: expected an example of item embeddings, "
            "(B, D), or their width D."
        )
    if not stores_embeddings(spec.dtype):
        raise DTypeError(
            f"embedding has dtype {dtype_name(spec.dtype)}: expected floating item embeddings, or "
            "FieldSpec((D,), 'int8') to store them as int8."
        )
    return spec


def _is_example(value: Any, backend: Backend) -> bool:
    """Return whether `value` is an array of a batch, and not the spec of a row."""
    if isinstance(value, FieldSpec):
        return False
    return backend.owns(value) or isinstance(value, np.ndarray | list)
