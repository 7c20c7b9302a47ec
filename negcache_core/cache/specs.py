"""Field specs: the name, row shape and dtype of what a cache stores."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from negcache_core.arrays._array import dtype_kind, dtype_name
from negcache_core.arrays.validation import as_whole
from negcache_core.errors import DTypeError, KeysError, KindError, ShapeError

MOST_AXES = 62
"""Of a row; with the slots and a tile there are 64, as many as NumPy and PyTorch can have."""


class FieldSpec(NamedTuple):
    """Row shape and dtype of a field of the cache.

    shape: the shape of one row, without the slot axis: () for a scalar such as an item id, (D,) for
           an embedding, (T, F) for a matrix
    dtype: a dtype of the framework or of NumPy, or its name: 'float32', 'bfloat16', 'int64',
           'bool', …

    Any object with `.shape` and `.dtype` will do instead, such as a `tf.io.FixedLenFeature` or an
    array of one row.

    >>> FieldSpec((128,), "float32")
    FieldSpec(shape=(128,), dtype='float32')
    """

    shape: tuple[int, ...]
    dtype: Any


def as_field_spec(key: str, spec: Any) -> FieldSpec:
    """Check `spec` and return it as a FieldSpec.

    Raises KindError without `.shape` and `.dtype`, ShapeError for a size that is unknown or
    negative, DTypeError for a dtype that is not bool, integer or real floating.
    """
    if not (hasattr(spec, "shape") and hasattr(spec, "dtype")):
        raise KindError(
            f"field {key!r} has spec {spec!r}: expected FieldSpec(shape, dtype), or any object "
            "with .shape and .dtype such as tf.io.FixedLenFeature."
        )
    try:
        shape = (spec.shape,) if isinstance(spec.shape, int) else tuple(spec.shape)
    except (TypeError, ValueError):  # TensorFlow has shapes of unknown rank
        shape = (None,)
    if isinstance(spec.shape, bytes):  # whose items are integers
        shape = (None,)
    sizes = tuple(-1 if (whole := as_whole(size)) is None else whole for size in shape)
    if any(size < 0 for size in sizes):
        raise ShapeError(
            f"field {key!r} has row shape {spec.shape}: every size must be a known, non-negative "
            "integer, because all rows of a cache have one shape. Pad variable-length features."
        )
    if len(sizes) > MOST_AXES:
        raise ShapeError(
            f"field {key!r} has rows of {len(sizes)} axes: expected at most {MOST_AXES}. "
            "Flatten what is stored."
        )
    if dtype_kind(spec.dtype) not in {"bool", "integer", "floating"}:
        raise DTypeError(
            f"field {key!r} has dtype {dtype_name(spec.dtype)}: expected bool, an integer or a "
            "real floating dtype. Store text as token ids, and complex numbers as two real fields."
        )
    return FieldSpec(sizes, spec.dtype)


def as_field_specs(specs: Any) -> dict[str, FieldSpec]:
    """Check a mapping of key -> spec; raise KeysError if it is empty or a key is no string."""
    if not isinstance(specs, Mapping):
        raise KindError(
            f"specs is a {type(specs).__name__}: expected a dict such as "
            "{'embedding': FieldSpec((128,), 'float32')}."
        )
    if not specs:
        raise KeysError("specs is empty: name at least the embedding field.")
    for key in specs:
        if not isinstance(key, str) or not key:
            raise KeysError(f"specs has key {key!r}: field names are non-empty strings.")
    return {key: as_field_spec(key, spec) for key, spec in specs.items()}
