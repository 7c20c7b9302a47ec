"""Matching: which slots hold an item that is equal to a given one."""

import math
from collections.abc import Sequence
from typing import Any

from negcache_core.arrays._array import (
    Array,
    cast,
    dtype_kind,
    dtype_name,
    fill,
    length,
    namespace,
    positions,
)
from negcache_core.errors import DTypeError

GROUP = 1024  # slots at a time when looking for the first match (measured)

FEW = 128
"""Rows that are compared with each slot; more are matched by sorting. Measured: from 64 rows on in
NumPy, PyTorch and TensorFlow, and from about 300 in JAX, sorting is the faster."""

PAIRS = 2**25
"""Comparisons of rows with slots, of some bytes each, that are held at a time; more are avoided by
sorting. Measured at 1,000,000 slots: from 32 rows on sorting takes no longer in NumPy and PyTorch,
and at 100 rows a fifth of the memory."""


def check_identifies(dtype: Any, what: str) -> None:
    """Raise DTypeError if values of `dtype` cannot identify items."""
    if dtype_kind(dtype) == "floating":
        raise DTypeError(
            f"{what} has dtype {dtype_name(dtype)}: floating values that went through a network "
            "are seldom equal. Identify items by an integer field."
        )


def equal_rows(rows: Array, table: Array, *, xp: Any = None) -> Array:
    """Return bool (n, C): whether each row (n, …) equals each row of table (C, …).

    It makes one n x C comparison per value in a row, one at a time, which bounds the memory.

    >>> import numpy as np
    >>> equal_rows(np.asarray([[1, 2]]), np.asarray([[1, 2], [1, 3]]))
    array([[ True, False]])
    """
    xp = namespace(rows, table, xp=xp)
    if len(table.shape) == 1:
        return rows[:, None] == table[None, :]
    equal = None
    for place in range(table.shape[1]):
        part = equal_rows(rows[:, place, ...], table[:, place, ...], xp=xp)
        equal = part if equal is None else equal & part
    if equal is None:  # rows without a value are all equal
        return (positions(rows, xp) >= 0)[:, None] & (positions(table, xp) >= 0)[None, :]
    return equal


def side_by_side(fields: Sequence[Array], *, xp: Any = None) -> Any:
    """Return integers (n, …) that are equal where all of several fields (n, …) are."""
    xp = namespace(*fields, xp=xp)
    columns = [positions(fields[0], xp)[:, None] * 0]  # rows without a value are all equal
    for rows in fields:
        width = math.prod(rows.shape[1:])
        if width:
            columns.append(cast(xp.reshape(rows, (-1, width)), xp.index_dtype, xp))
    return xp.concat(columns, axis=1)


def first_match(
    rows: Array, table: Array, written: Array, *, xp: Any = None
) -> tuple[Array, Array]:
    """Return (n,) the lowest written slot that holds each row, and bool (n,) whether any does.

    rows:    (n, …)
    table:   (C, …), of the same dtype
    written: bool (C,); other slots hold nothing

    >>> import numpy as np
    >>> table, written = np.asarray([0, 7, 7]), np.asarray([False, True, True])
    >>> first_match(np.asarray([7, 0]), table, written)
    (array([1, 0]), array([ True, False]))
    """
    xp = namespace(rows, table, written, xp=xp)
    count = rows.shape[0]
    if count is not None and count <= FEW and count * table.shape[0] <= PAIRS:
        return _first_by_pairs(rows, table, written, xp)
    return _first_by_sorting(rows, table, written, xp)


def _first_by_pairs(rows: Array, table: Array, written: Array, xp: Any) -> tuple[Array, Array]:
    """Compare each row with each slot: the fastest way for few rows."""
    # Whole groups, so that finding the place takes only one cheap reduction over n x C.
    groups = -(-table.shape[0] // GROUP)
    padding = groups * GROUP - table.shape[0]
    if padding:
        table = xp.concat([table, fill((padding, *table.shape[1:]), 0, table, xp)])
        written = xp.concat([written, fill((padding,), 0, written, xp)])
    equal = cast(equal_rows(rows, table, xp=xp) & written[None, :], xp.uint8, xp)
    by_group = xp.reshape(equal, (-1, groups, GROUP))
    group = xp.argmax(xp.max(by_group, axis=2), axis=1)
    flat = positions(rows, xp) * groups + group
    inside = xp.take_rows(xp.reshape(equal, (-1, GROUP)), flat)
    return group * GROUP + xp.argmax(inside, axis=1), xp.max(inside, axis=1) > 0


def _first_by_sorting(rows: Array, table: Array, written: Array, xp: Any) -> tuple[Array, Array]:
    """Look each slot up among the sorted rows: time and memory do not grow with pairs."""
    # One extra row, from the table, keeps every gather below defined if there are no rows.
    count, capacity = length(rows, xp) + 1, table.shape[0]
    keys = _as_numbers(xp.concat([cast(rows, table.dtype, xp), table[:1, ...], table], axis=0), xp)
    wanted, held = keys[:count], keys[count:]
    ordered = xp.sort(wanted)
    place = xp.minimum(xp.searchsorted(ordered, held), count - 1)
    hit = written & (xp.take_rows(ordered, place) == held)
    # Slots ordered by the row that they hold, the lowest of a row's slots first.
    group = xp.where(hit, place, count)
    order = xp.argsort(group, stable=True)
    first = xp.searchsorted(xp.take_rows(group, order), xp.searchsorted(ordered, wanted))
    slot = xp.take_rows(order, xp.minimum(first, capacity - 1))[:-1]
    wanted = wanted[:-1]
    found = xp.take_rows(hit, slot) & (xp.take_rows(held, slot) == wanted)
    return xp.where(found, slot, 0), found


def _as_numbers(rows: Array, xp: Any) -> Any:
    """Return (n,) integers that are equal where rows (n, …) are equal, in some order."""
    if len(rows.shape) == 1:
        return cast(rows, xp.index_dtype, xp)
    order, width = positions(rows, xp), math.prod(rows.shape[1:])
    if width == 0:  # rows without a value are all equal
        return order * 0
    columns = cast(xp.reshape(rows, (-1, width)), xp.index_dtype, xp)
    for column in reversed(range(width)):
        values = xp.take_rows(columns[:, column], order)
        order = xp.take_rows(order, xp.argsort(values, stable=True))
    ordered = xp.take_rows(columns, order)
    changed = xp.any(ordered[1:, :] != ordered[:-1, :], axis=1)
    zero = order[:1] * 0
    number = xp.concat([zero, xp.cumulative_sum(cast(changed, order.dtype, xp), axis=0)])
    return xp.put_rows(order, order, number)


def last_of_each(rows: Array, mask: Array | None = None, *, xp: Any = None) -> Array:
    """Return bool (n,): False for a masked row, and for one equal to a later unmasked row.

    >>> import numpy as np
    >>> last_of_each(np.asarray([5, 5, 5]), np.asarray([True, True, False]))
    array([False,  True, False])
    """
    xp = namespace(rows, xp=xp)
    place = positions(rows, xp)
    counts = place >= 0 if mask is None else mask
    return counts & (last_equal(rows, counts, xp=xp) == place)


def last_equal(rows: Array, counts: Array, *, xp: Any = None) -> Array:
    """Return (n,) where the last of the rows (n, …) that count, bool (n,), equals each that counts.

    For a row that does not count, the result is meaningless.

    >>> import numpy as np
    >>> last_equal(np.asarray([5, 6, 5]), np.asarray([True, True, True]))
    array([2, 1, 2])
    """
    xp = namespace(rows, counts, xp=xp)
    count = rows.shape[0]
    if count is None or count > FEW:
        return _last_by_sorting(rows, counts, xp)
    place = positions(rows, xp)
    if count == 0:  # some libraries have no maximum of an empty array
        return place
    equal = equal_rows(rows, rows, xp=xp) & counts[None, :]
    return xp.max(xp.where(equal, place[None, :], 0), axis=1)


def _last_by_sorting(rows: Array, counts: Array, xp: Any) -> Any:
    """Do what `last_equal` does in the time of a sort."""
    # One extra row, which does not count, keeps every gather below defined if there are no rows.
    counts = xp.concat([counts, fill((1,), value=False, like=counts, xp=xp)])
    keys = _as_numbers(xp.concat([rows, fill((1, *rows.shape[1:]), 0, rows, xp)], axis=0), xp)
    # Among equal rows, those that count come first, the last one before the others.
    place = positions(keys, xp)
    order = xp.argsort(xp.where(counts, -place, 1), stable=True)
    order = xp.take_rows(order, xp.argsort(xp.take_rows(keys, order), stable=True))
    first = xp.searchsorted(xp.take_rows(keys, order), keys)
    return xp.take_rows(order, first)[:-1]
