"""Calls of the user's item network, with an error that explains the dict it is called with."""

import linecache
import os
import re
import sys
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from negcache_core.arrays._array import Array
from negcache_core.errors import KeysError, KindError, NegcacheError


def embedded_by(item_network: Callable[[dict[str, Any]], Array], features: dict[str, Any]) -> Array:
    """Return item_network(features); this library calls networks only here.

    Raises KindError if the network treats its argument as an array, and KeysError if it reads
    a field that it does not get. Other errors of the network pass through unchanged.
    """
    try:
        return item_network(features)
    except (TypeError, AttributeError, ValueError, LookupError) as error:
        refusal = _refusal(error, item_network, features)
        if refusal is None:
            raise
        raise refusal from error


def _refusal(
    error: Exception, item_network: Callable[[dict[str, Any]], Any], features: Mapping[str, Any]
) -> Exception | None:
    """Return our own error, or None unless the network's error is clearly about the dict."""
    trace = error.__traceback__
    if trace is None or isinstance(error, NegcacheError):
        return None
    while trace.tb_next is not None:
        trace = trace.tb_next
    fields, text = list(features), _source(trace)
    key = error.args[0] if isinstance(error, KeyError) and error.args else None
    # What is subscripted, if the subscript failed.
    subscripted = "[" in text and _names_features(text.partition("[")[0], trace, fields)
    if isinstance(key, str) and "\n" not in key:  # Keras adds a report there
        if key in fields or not subscripted:
            return None
        return KeysError(
            f"the item network reads field {key!r}, but gets {fields}, the data_keys: labels are "
            f"not among them. Add {key!r} to data_keys, or do not use it in the network."
        )
    if isinstance(error, AttributeError):
        about = _is_features(error.obj, fields)
    elif isinstance(error, KeyError):
        about = subscripted
    elif re.search(r"\bdict\b", str(error)):
        about = _names_features(text, trace, fields)
    else:
        about = isinstance(error, TypeError) and subscripted
    # Libraries report it in many ways, and far from where it happened.
    inside = _is_installed(trace.tb_frame.f_code.co_filename)
    if not about and not (inside and _reads_nothing(item_network, features)):
        return None
    return KindError(
        f"the item network raised {type(error).__name__} when called with a dict of arrays, "
        f"fields {fields}: wrap yours, for example lambda features: "
        f"encoder(features[{fields[0]!r}])."
    )


def _is_installed(filename: str) -> bool:
    return "site-packages" in filename or "dist-packages" in filename


class _Watched(dict[str, Any]):
    """A dict that records whether anyone looked into it."""

    read = False

    def _look(self, name: str, *arguments: Any) -> Any:
        caller = sys._getframe(2).f_code.co_filename  # noqa: SLF001 - public, if not by its name
        # NumPy looks in it for the fields of a structured dtype.
        self.read = self.read or f"{os.sep}numpy{os.sep}" not in caller
        return getattr(super(), name)(*arguments)

    def __getitem__(self, key: Any) -> Any:
        # NumPy asks any dict for the "names" of a structured dtype.
        return self._look("__getitem__", key) if key in self else super().__getitem__(key)

    def __iter__(self) -> Any:  # also for **features
        return self._look("__iter__")

    def get(self, *arguments: Any) -> Any:
        return self._look("get", *arguments)

    def pop(self, *arguments: Any) -> Any:
        return self._look("pop", *arguments)

    def keys(self) -> Any:
        return self._look("keys")

    def values(self) -> Any:
        return self._look("values")

    def items(self) -> Any:
        return self._look("items")

    def copy(self) -> Any:
        return self._look("copy")


def _reads_nothing(
    item_network: Callable[[dict[str, Any]], Any], features: Mapping[str, Any]
) -> bool:
    """Return whether the network, called once more, fails before it looks into its argument."""
    watched = _Watched(features)
    try:
        item_network(watched)
    except Exception:  # noqa: BLE001 - whichever it is, it was raised once before
        return not watched.read
    return False


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
