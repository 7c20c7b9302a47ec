"""Which rows must not be a query's negatives: one rule for the cache, the batch and hard negatives.

A row that agrees with the query in any id, is of another group, or scores above the query's ceiling
does not count as a negative, and is not drawn.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from negcache_core.arrays._array import Array, ArrayT, cast, fill, positions


class Labels(NamedTuple):
    """What identifies rows (…): ids, integers (…) by key, and their group (…), or None."""

    ids: tuple[Any, ...] = ()
    group: Any = None

    def each(self, function: Callable[[Array], Array]) -> "Labels":
        """Return the labels with a function applied to each."""
        group = None if self.group is None else function(self.group)
        return Labels(tuple([function(ids) for ids in self.ids]), group)

    def arrays(self) -> tuple[Any, ...]:
        """Return all of them, None for no group."""
        return (*self.ids, self.group)


class Exclusions(NamedTuple):
    """What must not be a negative of each of B queries.

    ids:     (B, P) by key: the ids of the query's positives; a row with one of them does not count
    group:   (B,) only rows of this group are negatives; None for all
    ceiling: (B,) rows with a higher score do not count; None for no limit
    """

    ids: tuple[Any, ...] = ()
    group: Any = None
    ceiling: Any = None

    def arrays(self) -> tuple[Any, ...]:
        """Return all of them, None for those that are absent."""
        return (*self.ids, self.group, self.ceiling)

    @staticmethod
    def of(arrays: Sequence[Any]) -> "Exclusions | None":
        """Return the record of what `arrays` returned; None where it excludes nothing."""
        *ids, group, ceiling = arrays
        if not ids and group is None and ceiling is None:
            return None
        return Exclusions(tuple(ids), group, ceiling)

    def told(self) -> "Exclusions | None":
        """Return what labels alone decide: everything but a ceiling."""
        return Exclusions.of((*self.ids, self.group, None))

    def of_queries(self, rows: Array, xp: Any) -> "Exclusions":
        """Return the exclusions of some of the queries, by their rows (n,)."""
        found = [None if each is None else xp.take_rows(each, rows) for each in self.arrays()]
        return Exclusions(tuple(found[:-2]), *found[-2:])

    def admit(self, rows: Labels, scores: Array | None, *, last: bool = False) -> Any:
        """Return whether each row may be a negative of each query: the rule.

        rows:   labels (B, …) or (1, …); scores: (B, …), or None to apply no ceiling
        last:   labels are (n,), scores and result (n, B)

        Returns bool, or None where nothing is excluded.
        """
        found: Any = None
        for own, ids in zip(self.ids, rows.ids, strict=True):
            for place in range(own.shape[1]):  # one comparison of all rows at a time
                found = _both(found, _beside(ids, own[:, place], last, "differ"))
        if self.group is not None:
            found = _both(found, _beside(rows.group, self.group, last, "agree"))
        if self.ceiling is not None and scores is not None:
            ceiling = self.ceiling[None, :] if last else _spread(self.ceiling, scores)
            found = _both(found, ~(scores > ceiling))
        return found


def _both(left: Any, right: Any) -> Any:
    return right if left is None else left & right


def _beside(rows: Array, own: Array, last: bool, how: str) -> Any:
    """Compare labels (n,) with facts (B,), as (n, B) if last; else (B, …) with (B,)."""
    rows, own = (rows[:, None], own[None, :]) if last else (rows, _spread(own, rows))
    return rows == own if how == "agree" else rows != own


def _spread(own: Array, like: Array) -> Any:
    """Return (B,) so that it broadcasts over (B, …)."""
    return own[(slice(None),) + (None,) * (len(like.shape) - 1)]


def excluded(scores: ArrayT, rows: Labels, own: Exclusions, *, xp: Any) -> ArrayT:
    """Return scores (n, B), -inf where rows (n,) must not be the query's negatives."""
    admitted = own.admit(rows, scores, last=True)
    return scores if admitted is None else xp.where(admitted, scores, -float("inf"))


def exclude_in_place(scores: Any, rows: Labels, own: Exclusions, *, xp: Any) -> Any:
    """Do what `excluded` does, for libraries that write into their arrays.

    Few rows have the id of anyone's positive, and few score above a ceiling: those are found by
    passes over n numbers, or one over the scores, and only they are compared with every query.
    Not for tracing: values are read.
    """
    if scores.shape[0] * scores.shape[1] < SMALL:
        return excluded(scores, rows, own, xp=xp)
    if own.ids:
        _leave_ids_out_in_place(scores, rows.ids, own.ids, xp)
    if own.group is not None:
        _keep_groups_in_place(scores, rows.group, own.group, xp)
    if own.ceiling is not None:
        _cut_in_place(scores, own.ceiling, xp)
    return scores


SMALL = 2**13
"""Scores that cost less to compare than to look for the few."""


def _leave_ids_out_in_place(scores: Any, rows: Any, own: Any, xp: Any) -> None:
    """Set scores (n, B) to -inf where a row's id (n,) is one of the query's (B, P), for any key."""
    every, found = [], None
    for pair in zip(rows, own, strict=True):
        ids, theirs = (cast(each, xp.index_dtype, xp) for each in pair)
        wanted = xp.reshape(theirs, (-1,))
        low = _last_digits(wanted)
        table = cast(fill((low + 1,), 0, wanted, xp), xp.bool, xp)
        table[wanted & low] = True
        found = _either(found, xp.take(table, ids & low, axis=0))
        every.append((ids, theirs, wanted))
    (hit,) = xp.nonzero(found)
    if 16 * hit.shape[0] > scores.shape[0]:  # ids that agree in their last digits
        found = None
        for ids, _, wanted in every:
            some, ordered = ids[hit], xp.sort(wanted)
            place = xp.clip(xp.searchsorted(ordered, some), 0, ordered.shape[0] - 1)
            found = _either(found, ordered[place] == some)
        hit = hit[found]
    if hit.shape[0]:
        labels = Labels(tuple([ids[hit] for ids, _, _ in every]))
        admitted = Exclusions(tuple([theirs for _, theirs, _ in every])).admit(
            labels, None, last=True
        )
        scores[hit] = xp.where(admitted, scores[hit], -float("inf"))


def _either(left: Any, right: Any) -> Any:
    return right if left is None else left | right


def _last_digits(wanted: Array) -> int:
    """Return a mask of the last binary digits, in which few other numbers equal `wanted`."""
    return (1 << min(20, max(12, (256 * wanted.shape[0]).bit_length()))) - 1


def _keep_groups_in_place(scores: Any, rows: Array, own: Array, xp: Any) -> None:
    """Set scores (n, B) of rows (n,) of another group than the query's (B,) to -inf.

    A row gets the number of a query in its group, and through it a copy of that query's limits:
    the most that its score with each query can be, inf or -inf. A processor's cache holds these.
    """
    rows, own = cast(rows, xp.index_dtype, xp), cast(own, xp.index_dtype, xp)
    count, low = own.shape[0], _last_digits(own)
    table, group = fill((low + 1,), count, own, xp), own
    table[own & low] = positions(own, xp)
    if bool(
        (xp.min(rows) >= 0) & (xp.max(rows) <= low) & (xp.min(own) >= 0) & (xp.max(own) <= low)
    ):
        number = xp.take(table, rows, axis=0)
    else:
        group = xp.sort(own)
        number = xp.clip(xp.searchsorted(group, rows), 0, count - 1)
        number = xp.where(xp.take(group, number, axis=0) == rows, number, count)
    limits = xp.where(group[:, None] == own[None, :], float("inf"), -float("inf"))
    none = fill((1, count), -float("inf"), scores, xp)
    limits = xp.concat([cast(limits, scores.dtype, xp), none])
    size = max(1, AT_HAND // count)
    for start in range(0, scores.shape[0], size):
        some = scores[start : start + size]
        xp.minimum(some, xp.take(limits, number[start : start + size], axis=0), out=some)


AT_HAND = 2**17
"""Numbers that fit a processor's cache together with as many others."""


def _cut_in_place(scores: Any, ceiling: Array, xp: Any) -> None:
    """Set scores (n, B) above ceiling (B,) to -inf; read only stretches that have any."""
    count, queries = scores.shape
    whole = count // STRETCH
    if whole:
        shape: Any = (whole, STRETCH // FOLD, FOLD * queries)
        top = xp.max(xp.reshape(scores[: whole * STRETCH], shape), axis=1)
        above = xp.reshape(top, (whole, FOLD, queries)) > ceiling[None, None, :]
        (hit,) = xp.nonzero(xp.any(xp.reshape(above, (whole, FOLD * queries)), axis=1))
        if hit.shape[0]:
            parts = xp.reshape(scores[: whole * STRETCH], (whole, STRETCH, queries))
            found = parts[hit]
            parts[hit] = xp.where(found > ceiling, -float("inf"), found)
    rest = scores[whole * STRETCH :]
    rest[...] = xp.where(rest > ceiling, -float("inf"), rest)


STRETCH, FOLD = 128, 8
