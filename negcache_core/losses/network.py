"""Calling the user's item network, and saying what it was called with where it expects no dict."""

import linecache
import re
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from negcache_core.arrays._array import Array
from negcache_core.errors import KeysError, KindError, NegcacheError


def embedded_by(item_network: Callable[[dict[str, Any]], Array], features: dict[str, Any]) -> Array:
    """Return item_network(features); every call of a network by this library is made here.

    Raises KindError where the network takes its argument for an array, and KeysError where it reads
    a field that it is not given. Any other error of the network passes as it is.
    """
    try:
        return item_network(features)
    except (TypeError, AttributeError, ValueError, KeyError) as error:
        refusal = _refusal(error, features)
        if refusal is None:
            raise
        raise refusal from error


def _refusal(error: Exception, features: Mapping[str, Any]) -> Exception | None:
    """Return what to raise in our words, and None unless the error is plainly about the dict."""
    trace = error.__traceback__
    if trace is None or isinstance(error, NegcacheError):
        return None
    while trace.tb_next is not None:
        trace = trace.tb_next
    fields, text = list(features), _source(trace)
    key = error.args[0] if isinstance(error, KeyError) and error.args else None
    # What is subscripted, if it is that which failed.
    subscripted = "[" in text and _names_features(text.partition("[")[0], trace, fields)
    if isinstance(key, str) and "\n" not in key:  # Keras puts a report there
        if key in fields or not subscripted:
            return None
        return KeysError(
            f"the item network reads field {key!r}, and is given {fields}, the data_keys: labels "
            f"that are kept beside are not among them. Add {key!r} to data_keys, or do without it "
            "in the network."
        )
    if isinstance(error, AttributeError):
        about = _is_features(error.obj, fields)
    elif isinstance(error, KeyError):
        about = subscripted
    elif re.search(r"\bdict\b", str(error)):
        about = _names_features(text, trace, fields)
    else:
        about = isinstance(error, TypeError) and subscripted
    if not about:
        return None
    return KindError(
        f"the item network raised {type(error).__name__}, as it was called with a dict of arrays, "
        f"fields {fields}: wrap yours, such as lambda features: encoder(features[{fields[0]!r}])."
    )


def _is_features(value: Any, fields: list[str]) -> bool:
    """Return whether it is the network's argument, or a copy such as a wrapper makes."""
    return isinstance(value, Mapping) and list(value) == fields


def _names_features(text: str, trace: TracebackType, fields: list[str]) -> bool:
    """Return whether a piece of source names the network's argument; True for unknown source."""
    held = trace.tb_frame.f_locals
    names = re.findall(r"\w+", text) if text else list(held)
    return any(_is_features(held.get(name), fields) for name in names)


def _source(trace: TracebackType) -> str:
    """Return the piece of source that failed; empty where it is not known."""
    code = trace.tb_frame.f_code
    first, last, start, end = list(code.co_positions())[trace.tb_lasti // 2]
    if first is None or last is None:
        return ""
    lines = [linecache.getline(code.co_filename, line).encode() for line in range(first, last + 1)]
    lines[-1] = lines[-1][:end]
    lines[0] = lines[0][start:]
    return b"".join(lines).decode()
