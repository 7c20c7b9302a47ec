"""The options of the loss, checked as it is made."""

from typing import Any

from negcache_core.arrays.validation import as_whole, check_function, check_number, names_of
from negcache_core.errors import KindError, OptionError

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
            f"id_key is {id_key!r} and id_keys {id_keys!r}: give one of them; id_key='x' is short "
            "for id_keys=('x',)."
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


def check_item_fields(**keys: Any) -> None:
    """Raise KindError unless each is the name of a field, or None."""
    for name, key in keys.items():
        if key is not None and not isinstance(key, str):
            raise KindError(f"{name} is {key!r}: expected a field name, or None.")
