"""A model's features of a column, texts or not: count rows, select some, and compare them."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from negcache_torch import KindError
from torch import Tensor

from ._contents import text_ids
from ._facts import PROMPT
from ._forms import MASK, TOKENS, to_features, to_rows

_CLOSE = 0.01  # of the largest value: a batch may be rounded to fewer bits
_WHOLE = "the model's output for a column cannot be split into rows"


def count_of(column: Mapping[str, Any]) -> int:
    """Return how many rows a column has."""
    try:
        rows, _, _ = to_rows(column)
    except KindError:
        tensors = [column[TOKENS]] if TOKENS in column else [each for _, each in _tensors(column)]
        return min((len(each) for each in tensors), default=0)  # the rest have patches, or frames
    return len(rows[MASK])


def some_of(column: Mapping[str, Any], count: int, index: Tensor) -> dict[str, Any]:
    """Return a column with some of its `count` rows.

    index: (n,) which, in order

    Raises KindError if a tensor does not have one row for each of the column's.
    """
    if len(index) == count:
        return dict(column)
    try:
        rows, form, given = to_rows(column)
    except KindError:
        rows, form, given = {}, None, dict(column)
    odd = [key for key, value in _tensors(given) if len(value) != count and key != PROMPT]
    if odd:
        raise KindError(f"{_WHOLE}, {odd}: leave out mini_batch_size, and empty texts.")
    given = {key: value[index] if _by_row(value, count) else value for key, value in given.items()}
    if form is None:
        return given
    return {**given, **to_features({key: value[index] for key, value in rows.items()}, form)}


def unlike(one: Mapping[str, Any], column: Mapping[str, Any], row: int) -> str | None:
    """Return the name of a value in which a column's row differs from a column of one, or None.

    Values that are not by row are not compared.
    """
    if _prompt(one, 0) != _prompt(column, row):
        return PROMPT
    pair: list[Mapping[str, Any]] = []
    for each in (one, column):
        try:
            rows, _, given = to_rows(each)
            pair.append({**given, **rows})
        except KindError:
            pair.append(each)
    count = count_of(column)
    alone, many = pair
    tokens = alone.keys() & many.keys() >= {TOKENS, MASK}
    if tokens:
        ids = [text_ids(each[TOKENS], each[MASK]).tolist() for each in pair]
        if ids[0][0] != ids[1][row]:
            return TOKENS
    for key, value in _tensors(alone):
        other = many.get(key)
        if not isinstance(other, Tensor) or len(value) != 1 or not _by_row(other, count):
            continue
        of_tokens = tokens and value.shape == alone[TOKENS].shape  # padded on either side
        if not of_tokens and _apart(value[0], other[row]):
            return key
    return None


def _prompt(column: Mapping[str, Any], row: int) -> int:
    lengths = column.get(PROMPT)
    flat = torch.as_tensor(0 if lengths is None else lengths).flatten()
    return int(flat[row if len(flat) > 1 else 0])


def _apart(one: Tensor, other: Tensor) -> bool:
    """Return whether values differ where both have any; batches are padded."""
    if one.ndim != other.ndim:
        return True
    both = tuple(slice(min(sizes)) for sizes in zip(one.shape, other.shape, strict=True))
    left, right = one[both].double().cpu(), other[both].double().cpu()
    if not left.numel():
        return False
    return bool((left - right).abs().max() > _CLOSE * left.abs().max())


def _tensors(column: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    return (
        (key, value)
        for key, value in column.items()
        if isinstance(value, Tensor) and value.ndim > 0
    )


def _by_row(value: Any, count: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == count
