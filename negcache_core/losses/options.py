"""The options of the loss, checked when it is made."""

from collections.abc import Iterable
from typing import Any

from negcache_core.arrays.backend import Backend
from negcache_core.arrays.validation import (
    as_whole,
    check_flag,
    check_function,
    check_number,
    names_of,
)
from negcache_core.errors import KindError, OptionError
from negcache_core.retrieval.prefixes import Prefixes

MOST_DRAWS = 2**31 - 1
"""Draws per query: their positions fit an int32."""


def positive(number: Any, what: str, most: int | None = None) -> int:
    """Return a positive int, or raise OptionError."""
    whole = as_whole(number)
    if whole is None or whole < 1:
        raise OptionError(f"{what} is {number!r}: expected a positive int.")
    if most is not None and whole > most:
        raise OptionError(f"{what} is {number}: expected at most {most}.")
    return whole


def check_functions(**functions: Any) -> None:
    """Raise KindError unless each is a function, or None."""
    for name, function in functions.items():
        if function is not None:
            check_function(function, name, "a function, or None")


def id_fields(id_key: Any, id_keys: Any) -> tuple[str, ...]:
    """Return the fields of ids: `id_keys`, or the one `id_key`."""
    check_item_fields(id_key=id_key)
    if id_keys is None or (isinstance(id_keys, (tuple, list)) and not id_keys):
        return () if id_key is None else (id_key,)
    if id_key is not None:
        raise OptionError(
            f"id_key is {id_key!r} and id_keys {id_keys!r}: give only one of them; id_key='x' is "
            "short for id_keys=('x',)."
        )
    names = names_of(id_keys, "id_keys", "item_id", "tell items apart")
    if len(set(names)) < len(names):
        raise OptionError(f"id_keys is {names!r}: name each field once.")
    return names


def check_margin(margin: Any) -> float | None:
    """Return the margin, a finite number or None."""
    if margin is not None:
        check_number(margin, "margin")
    number: float | None = margin
    return number


def check_max_staleness(limit: Any) -> float | None:
    """Return the limit, a number above 0 or None."""
    if limit is not None:
        check_number(limit, "max_staleness")
        if limit <= 0:
            raise OptionError(
                f"max_staleness is {limit}: expected a number above 0, such as 0.2, or None to let "
                "rows of every age compete."
            )
    number: float | None = limit
    return number


def check_matryoshka(dims: Any, weights: Any, estimator: Any, **others: Any) -> Prefixes | None:
    """Return the widths, ascending, with their weights; None for no dims.

    others: options that do not work with dims, by name
    """
    if dims is None:
        if weights is not None:
            raise OptionError(
                f"matryoshka_weights is {weights!r} but there are no matryoshka_dims: give the "
                "widths that the weights are for, or leave the weights out."
            )
        return None
    given = _listed(dims, "matryoshka_dims", "(64, 128, 256)")
    widths = [as_whole(each) or 0 for each in given]
    if not widths or min(widths) < 1 or len(set(widths)) < len(widths):
        raise OptionError(
            f"matryoshka_dims is {dims!r}: expected distinct positive ints, the widths to which "
            "embeddings are cut, such as (64, 128, 256)."
        )
    numbers = [1.0] * len(widths)
    if weights is not None:
        numbers = _listed(weights, "matryoshka_weights", "(1.0, 1.0, 0.5)")
        for number in numbers:
            check_number(number, "a number of matryoshka_weights")
        if len(numbers) != len(widths) or min(numbers) <= 0:
            raise OptionError(
                f"matryoshka_weights is {weights!r} for matryoshka_dims {dims!r}: expected one "
                "number above 0 for each of them. Leave out a width that should not count."
            )
    others["estimator='paper'"] = True if estimator == "paper" else None
    for name, other in others.items():
        if other is not None:
            raise OptionError(
                f"matryoshka_dims do not work with {name}: all widths share their draws, through "
                "estimator='shared' or 'exact_query'. Leave one of the two out."
            )
    ordered = sorted(zip(widths, map(float, numbers), strict=True))
    return Prefixes(*map(tuple, zip(*ordered, strict=True)))


def check_fused(fused: Any, backend: Backend, **others: Any) -> bool:
    """Return the flag; raise OptionError if there is no kernel, or none for the other options.

    others: options that the kernel does not know, by name
    """
    if not check_flag(fused, "fused"):
        return False
    for name, other in others.items():
        if other is not None:
            raise OptionError(
                f"fused=True does not work with {name}: the kernel scores by dot products, and "
                "weighs whole blocks. Leave one of the two out."
            )
    backend.check_fused()
    return True


def _listed(values: Any, what: str, example: str) -> list[Any]:
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise KindError(f"{what} is {values!r}: expected several numbers, such as {example}.")
    return list(values)


def check_item_fields(**keys: Any) -> None:
    """Raise KindError unless each is the name of a field, or None."""
    for name, key in keys.items():
        if key is not None and not isinstance(key, str):
            raise KindError(f"{name} is {key!r}: expected a field name, or None.")
