"""Matching: which slots hold an item that is equal to a given one."""

from typing import Any

from negcache_core.arrays._array import (
    Array,
    cast,
    dtype_kind,
    dtype_name,
    fill,
    namespace,
    positions,
)
from negcache_core.errors import DTypeError

GROUP = 1024  # slots at a time, in looking for the first that matches (measured)


def check_identifies(dtype: Any, what: str) -> None:
    """Raise DTypeError if values of `dtype` cannot tell items apart."""
    if dtype_kind(dtype) == "floating":
        raise DTypeError(
            f"{what} has dtype {dtype_name(dtype)}: floating values that went through a network "
            "are seldom equal. Identify items by an integer field."
        )


def equal_rows(rows: Array, table: Array, *, xp: Any = None) -> Array:
    """Return bool (n, C): whether each of rows (n, …) equals each of table (C, …).

    One n x C comparison for every value in a row, one at a time, which bounds the memory.

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


def first_match(
    rows: Array, table: Array, written: Array, *, xp: Any = None
) -> tuple[Array, Array]:
    """Return (n,) the lowest written slot that holds each row, and bool (n,) whether one does.

    rows:    (n, …)
    table:   (C, …), of the same dtype
    written: bool (C,); other slots hold nothing

    >>> import numpy as np
    >>> table, written = np.asarray([0, 7, 7]), np.asarray([False, True, True])
    >>> first_match(np.asarray([7, 0]), table, written)
    (array([1, 0]), array([ True, False]))
    """
    xp = namespace(rows, table, written, xp=xp)
    # Whole groups, so that one cheap reduction by group is the only pass over n x C for the place.
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


def last_of_each(rows: Array, mask: Array | None = None, *, xp: Any = None) -> Array:
    """Return bool (n,): False for a masked row, and for one that a later unmasked row equals.

    >>> import numpy as np
    >>> last_of_each(np.asarray([5, 5, 5]), np.asarray([True, True, False]))
    array([False,  True, False])
    """
    xp = namespace(rows, xp=xp)
    place = positions(rows, xp)
    repeated = equal_rows(rows, rows, xp=xp) & (place[None, :] > place[:, None])
    if mask is None:
        return ~xp.any(repeated, axis=1)
    return mask & ~xp.any(repeated & mask[None, :], axis=1)
