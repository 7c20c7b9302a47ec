"""Docstrings, taken apart and put together: an adapter's class has the core's text and its own.

A docstring is paragraphs. A table of arguments is one whose first line is `name: what it is`, an
example begins with `>>>`, and what is indented is to be shown as it stands.
"""

import inspect
import itertools
import re
import textwrap
from collections.abc import Iterator
from typing import NamedTuple

_ENTRY = re.compile(r"(?P<names>[a-z_*]\w*(?:, [\w*]+)*):(?:\s+(?P<text>\S.*))?$")


class Paragraph(NamedTuple):
    """A paragraph's lines, and what it is: "text", "table", "example" or "verbatim"."""

    kind: str
    lines: list[str]

    def entries(self) -> dict[str, str]:
        """Return a table: name -> text; names that share an entry, `a, b: …`, have it each.

        >>> Paragraph("table", ["a, b: sizes,", "      in bytes"]).entries()
        {'a': 'sizes, in bytes', 'b': 'sizes, in bytes'}
        """
        found: dict[str, str] = {}
        names: list[str] = []
        for line in self.lines:
            entry = _ENTRY.match(line)
            if entry:
                names = entry["names"].split(", ")
                found |= dict.fromkeys(names, entry["text"] or "")
            else:
                found |= {name: f"{found[name]} {line.strip()}".strip() for name in names}
        return found


def paragraphs(docstring: str | None) -> list[Paragraph]:
    """Return the paragraphs of a docstring; None has none, as under `python -OO`."""
    return list(_paragraphs(inspect.cleandoc(docstring or "")))


def _paragraphs(text: str) -> Iterator[Paragraph]:
    for block in re.split(r"\n\s*\n", text):
        lines = block.splitlines()
        if not block.strip():
            continue
        if lines[0].startswith(">>>"):
            yield Paragraph("example", lines)
        elif lines[0].startswith(" "):
            yield Paragraph("verbatim", lines)
        else:
            table = list(itertools.takewhile(_in_table, lines))
            if table:
                yield Paragraph("table", table)
            if len(table) < len(lines):
                yield Paragraph("text", lines[len(table) :])


def _in_table(line: str) -> bool:
    return line.startswith(" ") or _ENTRY.match(line) is not None


def merged(core: str | None, own: str | None) -> str:
    r"""Return the docstring of an adapter's class or method, which extends the core's.

    First its own first paragraph, if it has one, and its own text; then the core's table, in which
    its own entries replace those of the same name; then the core's text; last its own examples, as
    those of the core are in NumPy.

    >>> print(merged("Adds.\n\nx: an array\ny: another", "Adds tensors.\n\nx: a tensor"))
    Adds tensors.
    <BLANKLINE>
    x: a tensor
    y: another
    """
    lead, *rest = paragraphs(core) or [Paragraph("text", [])]
    mine = paragraphs(own)
    if mine:
        lead, *mine = mine
    told = entries_of(mine)
    table = entries_of(rest) | told
    found = [lead, *(each for each in mine if each.kind not in ("table", "example"))]
    if table:
        found.append(Paragraph("table", [_line(name, text) for name, text in table.items()]))
    found += [each for each in rest if each.kind not in ("table", "example")]
    found += [each for each in mine if each.kind == "example"]
    return "\n\n".join("\n".join(each.lines) for each in found)


def _line(name: str, text: str) -> str:
    return textwrap.fill(f"{name}: {text}", 96, subsequent_indent="    ", break_long_words=False)


def entries_of(parts: list[Paragraph]) -> dict[str, str]:
    """Return the entries of all tables among paragraphs."""
    return {
        name: text
        for each in parts
        if each.kind == "table"
        for name, text in each.entries().items()
    }
