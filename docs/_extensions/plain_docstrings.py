"""The package's plain docstrings, for autodoc.

They are written to be read in a terminal: `name` for code, a table of `name: what it is` for
arguments, no markup beside. Here they become reStructuredText; what is no markup is escaped.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from sphinx.application import Sphinx

import negcache_core

_ENTRY = re.compile(r"(?P<names>[a-z_*]\w*(?:, [\w*]+)*):(?:\s+(?P<text>\S.*))?$")
_CODE = re.compile(r"`([^`]+)`")
_MARKUP = re.compile(r"([\\*|]|_\b)")


def setup(app: Sphinx) -> dict[str, Any]:
    """Let autodoc pass docstrings through here."""
    app.connect("autodoc-process-docstring", process)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def process(app: Sphinx, kind: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Rewrite the lines of one docstring in place, as autodoc asks for it."""
    del app, kind, name, value, options
    lines[:] = [line for block in _blocks(lines) for line in (*_markup(block), "")]


def _blocks(lines: Iterable[str]) -> Iterator[list[str]]:
    block: list[str] = []
    for line in (*lines, ""):
        if line.strip():
            block.append(line)
        elif block:
            yield block
            block = []


def _markup(block: list[str]) -> list[str]:
    if block[0].startswith(">>>"):
        return block
    if block[0].startswith(" "):
        return ["::", "", *("    " + line for line in block)]
    if _ENTRY.match(block[0]):
        return list(_table(block))
    return [_text(line) for line in block]


def _table(block: list[str]) -> Iterator[str]:
    for line in block:
        entry = _ENTRY.match(line)
        if entry:
            yield f"``{entry['names']}``"
            yield f"    {_text(entry['text'] or '')}"
        elif line.startswith(" "):
            yield f"    {_text(line.strip())}"
        else:  # the paragraph goes on after its table
            yield ""
            yield _text(line)


def _text(line: str) -> str:
    parts = _CODE.split(line)
    return "".join(
        _reference(part) if number % 2 else _MARKUP.sub(r"\\\1", part)
        for number, part in enumerate(parts)
    )


def _reference(code: str) -> str:
    """Return code as a link where it names something public of the core."""
    package, _, name = code.partition(".")
    if package == "negcache_core" and name in negcache_core.__all__:
        return f":py:obj:`{code}`"
    return f"``{code}``"
