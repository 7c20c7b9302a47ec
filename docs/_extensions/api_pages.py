"""The directive `.. api:: negcache_torch`: all public names of a package, by task.

Each has its signature, its arguments with types in the package's own terms, and its example.
"""

import inspect
from collections.abc import Iterator, MutableMapping
from typing import Any

from api_examples import SETUP, examples_of, sharing
from api_layout import LAYOUTS, NOTES, Section
from api_objects import (
    arguments_of,
    has,
    is_record,
    kind_of,
    parameters_of,
    prose_of,
    resolve,
)
from docutils import nodes
from plain_docstrings import arguments, rst_of, text_of
from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

import negcache_core

logger = logging.getLogger(__name__)
_TAGS: dict[str, tuple[str, MutableMapping[str, Any]]] = {}


def setup(app: Sphinx) -> dict[str, Any]:
    """Add the directive, and lead viewcode to where a name is defined."""
    app.add_directive("api", Api)
    app.connect("viewcode-follow-imported", module_of)
    app.connect("viewcode-find-source", tags_of)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


class Api(SphinxDirective):
    """Describe the package that is named."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return the page's sections."""
        text = "\n".join(page_of(self.arguments[0]))
        return self.parse_text_to_nodes(text, allow_section_headings=True)


def page_of(package: str) -> Iterator[str]:
    """Return the lines of a page, below its title."""
    sections = [
        section._replace(names=tuple(name for name in section.names if has(package, name)))
        for section in LAYOUTS[package]
    ]
    examples = examples_of(package)
    yield from _cards(package, sections)
    yield from (
        "**Every example on this page begins with these lines.**",
        "",
        *examples[SETUP].splitlines(),
        "",
    )
    for section in sections:
        yield from (f".. _{package}-{section.anchor}:", "", section.title, "-" * len(section.title))
        yield from ("", section.about, NOTES.get((package, section.anchor), ""), "")
        for name in section.names:
            example = examples.get(name, "").splitlines()
            first = next(each for each in sharing(examples).get(examples.get(name, ""), [name]))
            if first != name:
                example = [f"Example: {_linked_name(package, first)}."]
            yield from _entry(package, name, example)


def _cards(package: str, sections: list[Section]) -> Iterator[str]:
    """Summarise each section in a card: names with a clause, a class's methods on its line."""
    yield from (".. grid:: 1", "   :gutter: 3", "   :class-container: tasks", "")
    for section in sections:
        title = f":ref:`{section.title} <{package}-{section.anchor}>`"
        yield from (f"   .. grid-item-card:: {title}", "")
        for name, methods in with_methods(section.names):
            also = ", ".join(
                f":py:obj:`{method.rpartition('.')[2]} <{package}.{method}>`" for method in methods
            )
            line = f"{_linked_name(package, name)}: {summary_of(package, name)}"
            yield f"      * {line}" + (f". Members: {also}" if also else "")
        yield ""


def with_methods(names: tuple[str, ...]) -> list[tuple[str, list[str]]]:
    """Return names with those of their methods that come directly after them."""
    found: list[tuple[str, list[str]]] = []
    for name in names:
        if found and name.startswith(f"{found[-1][0]}."):
            found[-1][1].append(name)
        else:
            found.append((name, []))
    return found


def _linked_name(package: str, name: str) -> str:
    return f":py:obj:`{short_name(name)} <{package}.{name}>`"


def short_name(name: str) -> str:
    """Return a name as links show it: without the handler, of which most methods are."""
    return name.removeprefix("CacheLossHandler.")


def summary_of(package: str, name: str) -> str:
    """Return the first clause of a description, without its full stop."""
    if name in _DATA:
        return _DATA[name].partition(":")[0].rstrip(".")
    lead = " ".join(prose_of(package, name)[0].lines)
    clause = lead.partition(". ")[0].partition(";")[0].partition(": ")[0].rstrip(".:")
    return text_of(clause[0].lower() + clause[1:], _plain)


_DATA = {
    "EMPTY": "the age of a slot that was never written: larger than any other, so empty slots are "
    "filled first.",
    "__version__": "the version of the distribution.",
}


def _plain(code: str) -> None:
    del code


def _entry(package: str, name: str, example: list[str]) -> Iterator[str]:
    """Describe one name."""
    value = resolve(package, name)
    kind = kind_of(name, value)
    yield from (f".. py:{kind}:: {name}{_signature(package, name, kind)}", f"   :module: {package}")
    if kind == "data":
        yield f"   :value: {value!r}"
    yield ""
    body = _data(name) if kind == "data" else _body(package, name, own_example=not example)
    for line in (*body, *example, ""):
        yield f"   {line}".rstrip()


def _data(name: str) -> list[str]:
    return [_DATA[name][0].upper() + _DATA[name][1:], ""]


def _body(package: str, name: str, *, own_example: bool) -> Iterator[str]:
    def link(code: str) -> str | None:
        return linked(package, name, code)

    lead, *rest = prose_of(package, name)
    yield from rst_of([lead], link)
    if package != "negcache_sentence_transformers" and name == "NegativeCacheLoss":
        handler = f":py:obj:`CacheLossHandler <{package}.CacheLossHandler>`"
        yield from (f"Its methods are those of {handler}: the sections below.", "")
    table = {}
    for each in arguments_of(package, name):
        if not each.text:
            logger.warning("%s.%s: argument %s has no description", package, name, each.name)
        beside = [f"``{each.type}``"] if each.type else []
        beside += [f"default ``{each.default}``"] if each.default is not None else []
        starts = "->" not in each.text[:16]  # a sentence, not a mapping
        text = each.text[:1].upper() + each.text[1:] if starts else each.text
        table[each.name] = (beside, text)
    if table:
        yield from arguments(table, link)
    yield from rst_of((each for each in rest if own_example or each.kind != "example"), link)


def linked(package: str, name: str, code: str) -> str | None:
    """Return the full name of what code in a description names, or None."""
    code = code.removeprefix("negcache_core.").removesuffix("()")
    owner = name.partition(".")[0]
    known = {each for section in LAYOUTS[package] for each in section.names if each != name}
    for each in (code, f"{owner}.{code}", f"CacheLossHandler.{code}"):
        if each in known and has(package, each):
            return f"{package}.{each}"
    return None


def _signature(package: str, name: str, kind: str) -> str:
    value = resolve(package, name)
    if is_record(value):  # users make the short ones
        return f"({', '.join(value._fields)})" if len(value._fields) == 2 else ""
    if kind in ("data", "property", "exception") or not callable(value):
        return ""
    if inspect.isclass(value) and inspect.isabstract(value):
        return ""
    shown = []
    starred = False
    for each in parameters_of(package, name):
        if each.kind is inspect.Parameter.KEYWORD_ONLY and not starred:
            shown.append("*")
            starred = True
        default = each.default
        mark = {each.VAR_POSITIONAL: "*", each.VAR_KEYWORD: "**"}.get(each.kind, "")
        told = "" if default is each.empty else f"={getattr(default, '__name__', repr(default))}"
        shown.append(f"{mark}{each.name}{told}")
    return f"({', '.join(shown)})"


def module_of(app: Sphinx, package: str, name: str) -> str | None:
    """Return the module in which a public name is defined, and note the name it has there."""
    del app
    if package not in LAYOUTS:
        return None
    value = resolve(package, name) if has(package, name) else None
    value = value.fget if isinstance(value, property) else value
    if inspect.isclass(value) and value.__module__ == package:  # made by bind
        value = next((each for each in value.__mro__ if each.__module__ != package), None)
    elif "." not in name:
        value = getattr(negcache_core, name, value)
    module = getattr(value, "__module__", "")
    if not module.startswith("negcache_"):
        return None
    tags = tags_of(None, module)
    if tags is not None and value.__qualname__ in tags[1]:
        tags[1][name] = tags[1][value.__qualname__]
    return module


def tags_of(app: Sphinx | None, module: str) -> tuple[str, MutableMapping[str, Any]] | None:
    """Return the source of a module and where its names stand, those of `module_of` among them."""
    del app
    if module not in _TAGS:
        analyzer = ModuleAnalyzer.for_module(module)
        analyzer.find_tags()
        _TAGS[module] = analyzer.code, dict(analyzer.tags)
    return _TAGS[module]
