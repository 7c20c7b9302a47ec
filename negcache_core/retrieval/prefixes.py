"""Matryoshka embeddings: their first coordinates are embeddings too, scored by cosine.

Every width's score of a query with an item is a sum over the first coordinates, divided by the two
lengths: one product, computed in segments and summed along the way, serves all widths.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from negcache_core.arrays._array import Array, cast, fill, length
from negcache_core.arrays.numerics import log_sum_exp
from negcache_core.errors import ShapeError


class Prefixes(NamedTuple):
    """The W widths at which embeddings are compared, ascending, and the weight of each's loss."""

    widths: tuple[int, ...]
    weights: tuple[float, ...]

    @property
    def number(self) -> int:
        """W."""
        return len(self.widths)

    @property
    def widest(self) -> int:
        """The last width."""
        return self.widths[-1]

    def check(self, width: int | None) -> None:
        """Raise ShapeError unless embeddings of this width have all of these widths."""
        if width is not None and self.widest > width:
            raise ShapeError(
                f"matryoshka_dims has {self.widest}, but embeddings are {width} wide: use widths "
                f"of at most {width}."
            )

    def segments(self) -> Iterator[tuple[int, int, int]]:
        """Yield each width's index, and the start and end of what it adds to the one before."""
        ends = itertools.pairwise((0, *self.widths))
        yield from ((place, start, stop) for place, (start, stop) in enumerate(ends))

    def log_shares(self, like: Array, xp: Any) -> Any:
        """Return the log of each width's share of a query's draws, (W,), set by its weight.

        The result has the dtype and the device of `like`.
        """
        total = math.fsum(self.weights)
        return _numbers([math.log(weight / total) for weight in self.weights], like, xp)

    def weighted_sum(self, values: Array, xp: Any) -> Any:
        """Return (B,): the sum over widths of the weight times values (B, W)."""
        return xp.sum(values * _numbers(self.weights, values, xp)[None, :], axis=1)


def _numbers(values: Sequence[float], like: Array, xp: Any) -> Any:
    return xp.concat([fill((1,), value, like, xp) for value in values], axis=0)


def inverse_lengths(rows: Array, prefixes: Prefixes, xp: Any) -> Any:
    """Return 1 / |row[:w]| at every width: (n, W) of (n, D), (B, n, W) of (B, n, D).

    0 if the length is 0: such a row scores 0, and has no gradient there.
    """
    squares, total, found = rows * rows, None, []
    for _, start, stop in prefixes.segments():
        part: Any = xp.sum(squares[..., start:stop], axis=-1)
        total = part if total is None else total + part
        found.append(total[..., None])
    total = found[0] if len(found) == 1 else xp.concat(found, axis=-1)
    some = total > 0
    return cast(some, rows.dtype, xp) / xp.sqrt(xp.where(some, total, 1.0))


def with_factors(queries: Array, scale: Any, prefixes: Prefixes, xp: Any) -> Any:
    """Return queries with the factors of their products at every width: (B, D + W)."""
    factors = inverse_lengths(queries, prefixes, xp)
    return xp.concat([queries, factors if scale is None else factors * scale], axis=1)


def parted(scaled: Array, prefixes: Prefixes) -> tuple[Any, Any]:
    """Return queries (B, D) and factors (B, W) from what `with_factors` returned."""
    width = scaled.shape[1] - prefixes.number
    return scaled[:, :width], scaled[:, width:]


def by_item(scaled: Array, items: Array, prefixes: Prefixes, xp: Any) -> list[Any]:
    """Return the scores of items (n, D) with queries, for each width: (n, B)."""
    (queries, factors), products, found = parted(scaled, prefixes), None, []
    inverse = inverse_lengths(items, prefixes, xp)
    for place, start, stop in prefixes.segments():
        part: Any = xp.matmul_transposed(items[:, start:stop], queries[:, start:stop])
        products = part if products is None else products + part
        found.append(products * inverse[:, place][:, None] * factors[:, place][None, :])
    return found


def by_row(scaled: Array, items: Array, prefixes: Prefixes, xp: Any) -> list[Any]:
    """Return the scores of queries with their own items (B, n, D), for each width: (B, n)."""
    (queries, factors), products, found = parted(scaled, prefixes), None, []
    inverse = inverse_lengths(items, prefixes, xp)
    for place, start, stop in prefixes.segments():
        part: Any = xp.matmul(items[:, :, start:stop], queries[:, start:stop, None])[:, :, 0]
        products = part if products is None else products + part
        found.append(products * inverse[:, :, place] * factors[:, place][:, None])
    return found


def pairs(scaled: Array, items: Array, prefixes: Prefixes, xp: Any) -> Any:
    """Return the scores of queries with their own items at every width, by query and width.

    items: (B, D) or (B, n, D); returns (B * W,) or (B * W, n)
    """
    (queries, factors), total, found = parted(scaled, prefixes), None, []
    if len(items.shape) == 3:
        queries, factors = queries[:, None, :], factors[:, None, :]
    products, inverse = queries * items, inverse_lengths(items, prefixes, xp)
    for place, start, stop in prefixes.segments():
        part: Any = xp.sum(products[..., start:stop], axis=-1)
        total = part if total is None else total + part
        found.append((total * inverse[..., place] * factors[..., place])[:, None, ...])
    joined = found[0] if len(found) == 1 else xp.concat(found, axis=1)
    return by_query_and_width(joined, xp)


def cross(scaled: Array, items: Array, prefixes: Prefixes, xp: Any) -> Any:
    """Return the scores of queries with items (n, D), by query and width: (B * W, n)."""
    parts = [xp.matrix_transpose(each) for each in by_item(scaled, items, prefixes, xp)]
    return by_query_and_width(beside(parts, xp), xp)


def by_query_and_width(array: Array, xp: Any) -> Any:
    """Return (B, W, …) as (B * W, …); there may be nothing in it, so its size is not left open."""
    sizes = [length(array, xp, axis) for axis in range(len(array.shape))]
    return xp.reshape(array, (sizes[0] * sizes[1], *sizes[2:]))


def beside(parts: list[Any], xp: Any) -> Any:
    """Return the widths' parts (B, n), stacked: (B, W, n)."""
    return xp.concat([part[:, None, :] for part in parts], axis=1)


def at_widest(rows: Array, prefixes: Prefixes, xp: Any) -> Any:
    """Return rows (n, D) cut to the last width and normalised: (n, w)."""
    one = Prefixes(prefixes.widths[-1:], prefixes.weights[-1:])
    return rows[:, : prefixes.widest] * inverse_lengths(rows, one, xp)


def log_drawable(log_partition: Array, prefixes: Prefixes, xp: Any) -> Any:
    """Return (B,): the log of the total share in the draws of widths with a usable slot.

    log_partition: (B, W). The result is NaN if one of them is: such a query draws nothing.
    """
    none = log_partition == -float("inf")
    known = prefixes.log_shares(log_partition, xp) + 0.0 * xp.where(none, 0.0, log_partition)
    return log_sum_exp(xp.where(none, -float("inf"), known), xp=xp)


def of_mixture(log_partition: Array, prefixes: Prefixes, xp: Any) -> Any:
    """Return (B, W): what to subtract from scores to get the log of a part of the proposal.

    A query draws from the mixture of its softmaxes at all widths: its proposal is the sum over
    widths of exp(score - this).
    """
    shares = prefixes.log_shares(log_partition, xp)
    return log_partition - shares + log_drawable(log_partition, prefixes, xp)[:, None]


def of_parts(log_partition: Array, prefixes: Prefixes, xp: Any) -> Any:
    """Return (…, W): what to subtract from a part's log-sum-exp to get its weight in the mixture.

    log_partition: (…, W) of everything; gives 0 for widths without a usable slot (parts of -inf)
    """
    lowered = log_partition - prefixes.log_shares(log_partition, xp)
    return xp.where(log_partition == -float("inf"), 0.0, lowered)
