"""Embeddings of one width: which argument is the odd one out, if they disagree."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from negcache_core.cache.state import NegativeCache, data_of
from negcache_core.errors import ShapeError


def check_widths(table: Any, key: str, given: Mapping[str, Any]) -> None:
    """Raise ShapeError unless arrays (…, D) have the width of rows of the cache's field `key`.

    table: some of these rows; given: argument name -> array

    The message names the argument that differs from the others, or all of them if no two agree.
    For use after a check has failed: it does not check that each is an array of rows.
    """
    field = f"field {key!r} of the cache"
    shapes = {field: _shape(table)}
    shapes.update((what, _shape(array)) for what, array in given.items())
    widths = {
        what: shape[-1]
        for what, shape in shapes.items()
        if len(shape) > 1 and shape[-1] is not None
    }
    (width, most), *others = Counter(widths.values()).most_common(2) or [(None, 0)]
    if not others:
        return
    if most == others[0][1]:
        told = _listed(f"{what} has shape {shapes[what]}" for what in [*list(widths)[1:], field])
        raise ShapeError(
            f"{told}: expected one width, the last size, that of the towers and in the cache's "
            "specs."
        )
    odd = next(what for what, size in widths.items() if size != width)
    agreeing = _listed(what for what, size in widths.items() if size == width)
    advice = f" Make the cache with FieldSpec(({width},), …) for it." if odd == field else ""
    raise ShapeError(
        f"{odd} has shape {shapes[odd]}: expected width {width}, that of {agreeing}.{advice}"
    )


def _listed(parts: Iterable[str]) -> str:
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last


def table_of(cache: Any, key: str) -> Any:
    """Return a field of a cache, or of the first of several by name; None if there is none.

    For a cache that is not known to be valid.
    """
    if isinstance(cache, Mapping) and not isinstance(cache, NegativeCache):
        cache = next(iter(cache.values()), None)
    rows = data_of(cache)
    return rows.get(key) if isinstance(rows, Mapping) else None


def _shape(array: Any) -> tuple[Any, ...]:
    try:
        return tuple(getattr(array, "shape", ()))
    except ValueError:  # TensorFlow: unknown rank
        return ()
