"""Sizes and scalars as text."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from negcache_core.arrays._array import dtype_name


def fields_in_words(fields: Mapping[str, Any], slots: int) -> str:
    """Return the size and fields of `slots` rows; a field has a row's `.shape`, and `.dtype`."""
    size = slots * sum(map(bytes_of, fields.values()))
    listed = ", ".join(
        f"{key} {dtype_name(field.dtype)} {tuple(field.shape)}" for key, field in fields.items()
    )
    return f"{bytes_in_words(size)}: {listed}"


def bytes_of(field: Any) -> int:
    """Return the bytes of a row of a field, which has a row's `.shape`, and `.dtype`."""
    return int(np.prod(field.shape)) * _bytes(dtype_name(field.dtype))


def bytes_in_words(size: float) -> str:
    """Return a size as a person would say it.

    >>> bytes_in_words(288), bytes_in_words(33_554_432)
    ('288 bytes', '33.6 MB')
    """
    if size < 1_000:
        return f"{size:.0f} bytes"
    for unit in ("kB", "MB", "GB"):
        size /= 1_000
        if size < 1_000:
            return f"{size:.1f} {unit}"
    return f"{size / 1_000:.1f} TB"


def number_of(value: Any) -> float | None:
    """Return a scalar of any library as a float; None where it cannot be read, as in a trace."""
    try:
        return float(value)
    except Exception:  # noqa: BLE001 - each library refuses in its own way, and print must not
        return None


def _bytes(name: str) -> int:
    bits = re.search(r"\d+", name)
    return int(bits.group()) // 8 if bits else 1
