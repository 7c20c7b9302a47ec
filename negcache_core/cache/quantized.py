"""Embeddings as int8: each row has a scale of its own, the largest of its numbers over 127.

The codes are in the embedding's field, the scales in a field that is named after it. So a cache
shows by itself that it is quantized, and plans, files and shards treat scales like any other field.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from negcache_core.arrays._array import Array, cast, dtype_kind, dtype_name, namespace
from negcache_core.arrays.numerics import finite_rows
from negcache_core.cache.specs import FieldSpec
from negcache_core.errors import DTypeError, KeysError

LARGEST = 127.0
"""The largest code. -128 is not used, so that codes are symmetric."""


LARGEST_SCALE = 2.6793885e36
"""The largest scale whose product with the largest code is finite in float32."""


SUFFIX = "_scale"
"""What the name of a field of scales has after that of the codes."""


def scales_in(data: Mapping[str, Any]) -> dict[str, str]:
    """Return the quantized fields, with the names of their scales' fields.

    data: tables, or specs, by field
    """
    found = {}
    for key in data:
        if key.endswith(SUFFIX) and _scales(data, key):
            found[key.removesuffix(SUFFIX)] = key
    return found


def _scales(data: Mapping[str, Any], key: str) -> bool:
    """Return whether a field holds scales: one float32 for each row of a field of codes."""
    codes, scale = data.get(key.removesuffix(SUFFIX)), data[key]
    if codes is None or dtype_name(codes.dtype) != "int8" or len(codes.shape) == 0:
        return False
    return dtype_name(scale.dtype) == "float32" and tuple(scale.shape) == tuple(codes.shape)[:-1]


def stores_embeddings(dtype: Any) -> bool:
    """Return whether embeddings can be stored in a dtype."""
    return dtype_kind(dtype) == "floating" or dtype_name(dtype) == "int8"


def with_scales(
    specs: Mapping[str, FieldSpec], key: str, dtype: Any = "float32"
) -> dict[str, FieldSpec]:
    """Return specs in which an int8 embedding has its scales; raise DTypeError if they cannot be.

    dtype: the library's float32

    >>> list(with_scales({"embedding": FieldSpec((4,), "int8")}, "embedding"))
    ['embedding', 'embedding_scale']
    """
    found, scale = dict(specs), key + SUFFIX
    if dtype_name(specs[key].dtype) != "int8":
        return found
    spec = found.setdefault(scale, FieldSpec((), dtype))
    if spec.shape != () or dtype_name(spec.dtype) != "float32":
        raise DTypeError(
            f"field {scale!r} is {spec}, but it must hold the scales of the int8 embeddings in "
            f"{key!r}, FieldSpec((), 'float32'): give your field another name, or leave it out."
        )
    return found


def check_not_named(fields: Iterable[Any], specs: Mapping[str, Any], key: str) -> None:
    """Raise KeysError if `fields` name embeddings that are stored as codes, or their scales.

    specs: specs or tables, by field; key: the embedding's field
    """
    if dtype_name(specs[key].dtype) != "int8":
        return
    named = [field for field in fields if field in (key, key + SUFFIX)]
    if named:
        raise KeysError(
            f"data_keys, id_keys, group_key or log_frequency_key names {named}, but {key!r} has "
            f"the codes of int8 embeddings, and {key + SUFFIX!r} their scales: name other fields, "
            "or store the embeddings in a floating dtype."
        )


def quantize(rows: Array, *, xp: Any = None) -> tuple[Any, Any]:
    """Return embeddings as int8 codes, and each row's scale: codes * scale is about the row.

    rows: floating (n, D)

    Returns int8 (n, D) and float32 (n,). Each number moves by at most half a scale, 1/254 of the
    row's largest. A row of zeros has scale 0, a row that is not finite has codes of 0 and scale
    inf. Raises DTypeError unless rows are floating.

    >>> import numpy as np
    >>> codes, scale = quantize(np.asarray([[0.5, -1.0], [0.0, 0.0]], dtype=np.float32))
    >>> codes, scale.round(5)
    (array([[  64, -127],
           [   0,    0]], dtype=int8), array([0.00787, 0.     ], dtype=float32))
    """
    xp = namespace(rows, xp=xp)
    if dtype_kind(rows.dtype) != "floating":
        raise DTypeError(
            f"rows have dtype {dtype_name(rows.dtype)}: expected floating embeddings to quantize."
        )
    rows = cast(rows, xp.float32, xp)
    finite = finite_rows(rows, xp=xp)  # XLA's maximum may pass over a NaN
    scale = xp.clip(xp.max(xp.abs(rows), axis=-1) / LARGEST, 0.0, LARGEST_SCALE)
    scale = xp.where(finite, scale, float("inf"))
    usable = finite & (scale > 0.0)
    codes = xp.round(rows / xp.where(usable, scale, 1.0)[..., None])
    codes = xp.where(usable[..., None], xp.clip(codes, -LARGEST, LARGEST), 0.0)
    return xp.astype(codes, xp.int8), scale


def dequantize(codes: Array, scale: Array, *, xp: Any = None) -> Any:
    """Return the embeddings of codes (..., D) with scales (...): float32.

    >>> import numpy as np
    >>> dequantize(np.asarray([[2, -4]], dtype=np.int8), np.asarray([0.5], dtype=np.float32))
    array([[ 1., -2.]], dtype=float32)
    """
    xp = namespace(codes, scale, xp=xp)
    return xp.astype(codes, xp.float32) * scale[..., None]


def embeddings_at(data: Mapping[str, Any], key: str, slots: Array, xp: Any) -> Any:
    """Return the embeddings at slots (n,): (n, D), of the table's dtype, or float32 of codes."""
    rows, scale = xp.take_rows(data[key], slots), scales_in(data).get(key)
    if scale is None:
        return rows
    return dequantize(rows, xp.take_rows(data[scale], slots), xp=xp)


def as_stored(rows: Mapping[str, Array], scales: Mapping[str, str], xp: Any) -> dict[str, Array]:
    """Return rows by field as tables with these `scales_in` hold them: codes and scales."""
    found = dict(rows)
    for key, scale in scales.items():
        if key in rows and scale not in rows:
            found[key], found[scale] = quantize(rows[key], xp=xp)
    return found
