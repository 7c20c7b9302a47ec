"""Approximate top-k: the best of each of k contiguous groups."""

from typing import Any

from negcache_core._array import Array, arange_like, namespace
from negcache_core.arguments import as_whole, check_floating
from negcache_core.errors import CapacityError, KindError, ShapeError


def check_top_k(k: Any) -> int | None:
    """Return `k` as an int, or None; raise unless it is None or a positive integer."""
    if k is None:
        return None
    number = as_whole(k)
    if number is None:
        raise KindError(f"top_k is {k!r}: expected None or a positive int.")
    if number < 1:
        raise CapacityError(f"top_k is {k}: expected at least 1, or None to use every slot.")
    return number


def check_groups(k: int, slots: int) -> None:
    """Raise CapacityError unless there is at least one slot for each of k groups."""
    if k > slots:
        raise CapacityError(
            f"top_k is {k} and there are {slots} slots: at most one group for each slot. Lower "
            "top_k, or raise cache_size."
        )


def group_of(slots: Array, total: int, k: int, xp: Any) -> Array:
    """Return which of k contiguous groups of `total` slots each of `slots` is in.

    >>> import numpy as np
    >>> group_of(np.arange(5), 5, 2, np)
    array([0, 0, 0, 1, 1])
    """
    width, longer = divmod(total, k)
    cut = longer * (width + 1)
    return xp.where(slots < cut, slots // (width + 1), longer + (slots - cut) // width)


def approximate_top_k_with_indices(scores: Array, k: int, *, xp: Any = None) -> tuple[Array, Array]:
    """Return the highest score of each of k contiguous groups of columns, and its column.

    scores: (B, C); 1 <= k <= C. The first C mod k groups have one column more than the others.
    Returns (B, k) scores and (B, k) columns; ties go to the lowest column.

    Differs from the published code, where k must divide C. Raises CapacityError if k > C.

    >>> import numpy as np
    >>> approximate_top_k_with_indices(np.asarray([[1.0, 2.0, 3.0, 9.0, 4.0]]), 2)
    (array([[3., 9.]]), array([[2, 3]]))
    """
    xp = namespace(scores, xp=xp)
    k = check_top_k(k) or 1
    if len(scores.shape) != 2:
        raise ShapeError(f"scores has shape {tuple(scores.shape)}: expected (B, C).")
    check_floating(scores, "scores")
    columns = scores.shape[1]
    check_groups(k, columns)
    width, longer = divmod(columns, k)
    cut = longer * (width + 1)
    best, places = [], []
    # Groups of two sizes: the longer ones first.
    for start, stop, size in ((0, cut, width + 1), (cut, columns, width)):
        if start == stop:
            continue
        groups = xp.reshape(scores[:, start:stop], (-1, (stop - start) // size, size))
        best.append(xp.max(groups, axis=-1))
        first = start + size * arange_like((stop - start) // size, scores, xp)
        places.append(xp.argmax(groups, axis=-1) + first)
    return xp.concat(best, axis=1), xp.concat(places, axis=1)
