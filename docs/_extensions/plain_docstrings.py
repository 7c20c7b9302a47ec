"""The package's plain docstrings as reStructuredText, for autodoc and for `api_pages`.

They are written to be read in a terminal: `name` for code, a table of `name: what it is` for
arguments, no other markup. What is no markup is escaped here.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from sphinx.application import Sphinx

import negcache_core
from negcache_core.docstrings import Paragraph, paragraphs

_CODE = re.compile(r"`([^`]+)`")
_MARKUP = re.compile(r"([\\*|]|_\b)")
_NAME = re.compile(r"[\w.]+(?:\(\))?")
_CLASS = re.compile(r"\b[A-Z]+[a-z]+[A-Z]\w*\b")
_VALUE = re.compile(r'"\w+"')
_PAGE = re.compile(r"(?<![\w/])docs/([\w-]+)\.md")

Link = Callable[[str], str | None]


def setup(app: Sphinx) -> dict[str, Any]:
    """Let autodoc pass docstrings through here."""
    app.connect("autodoc-process-docstring", process)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def process(app: Sphinx, kind: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Rewrite the lines of one docstring in place, as autodoc asks for it."""
    del app, kind, name, value, options
    lines[:] = rst_of(paragraphs("\n".join(lines)))


def rst_of(parts: Iterable[Paragraph], link: Link | None = None) -> list[str]:
    """Return paragraphs as lines of reStructuredText.

    link: code -> the full name of what it names, or None; by default names of the core are links
    """
    found: list[str] = []
    for part in parts:
        if part.kind == "table":
            found += arguments({name: ([], text) for name, text in part.entries().items()}, link)
        elif part.kind == "verbatim":
            found += ["::", "", *("    " + line for line in part.lines), ""]
        elif part.kind == "example":
            found += [*part.lines, ""]
        else:
            found += [text_of(" ".join(line.strip() for line in part.lines), link), ""]
    return found


def arguments(entries: Mapping[str, tuple[list[str], str]], link: Link | None = None) -> list[str]:
    """Return a list of arguments: name -> (what stands beside it, such as its type; its text)."""
    found = [".. rst-class:: arguments", ""]
    for name, (beside, text) in entries.items():
        found += [" : ".join([f"``{name}``", *beside]), f"    {text_of(text, link) or chr(92)}"]
    return [*found, ""]


def text_of(line: str, link: Link | None = None) -> str:
    """Return a line of a docstring as reStructuredText; pages and classes in it become links."""
    link = link or _of_the_core
    parts = _CODE.split(line)
    return "".join(
        _code(part, link) if number % 2 else _prose(part, link) for number, part in enumerate(parts)
    )


def _code(code: str, link: Link) -> str:
    if page := _PAGE.fullmatch(code):
        return f":doc:`/{page[1]}`"
    target = link(code) if _NAME.fullmatch(code) else None
    return f"``{code}``" if target is None else _role(code, target)


def _role(text: str, target: str) -> str:
    return f"\\ :py:obj:`{text} <{target}>`\\ "  # whatever stands beside it


def _prose(text: str, link: Link) -> str:
    def linked(found: re.Match[str]) -> str:
        target = link(found[0])
        return found[0] if target is None else _role(found[0], target)

    values = _VALUE.findall(text)
    parts = [
        _PAGE.sub(r":doc:`/\1`", _CLASS.sub(linked, _MARKUP.sub(r"\\\1", part)))
        for part in _VALUE.split(text)
    ]
    return "".join(
        part + (f"\\ ``{value}``\\ " if value else "")
        for part, value in zip(parts, [*values, ""], strict=True)
    )


def _of_the_core(code: str) -> str | None:
    name = code.removeprefix("negcache_core.")
    return f"negcache_core.{name}" if name in negcache_core.__all__ else None
