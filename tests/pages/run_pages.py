"""Run the Python of Markdown pages: python run_pages.py negcache_torch README.md docs/a.md …

A block belongs to the framework that it imports, else to that of the block before it, else to the
first that its page imports. Blocks of one framework on a page share a namespace, unless a block
imports the framework anew: then it is a program of its own. Prints a line of JSON for each block.
"""

import contextlib
import doctest
import io
import json
import re
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
FENCE = re.compile(
    r"^(?:<!-- from (?P<source>\S+) -->\n)?```(?P<kind>\w+)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
RUNS_ON = {"negcache_keras": "negcache_tensorflow"}  # Keras's own choice
IMPORT = re.compile(r"^(?:import|from) (negcache_\w+)\b(?!\.)", re.MULTILINE)  # not of a module


class Block(NamedTuple):
    """Python on a page: where it starts, whose it is, and what the page says that it prints."""

    line: int
    framework: str  # empty on a page of excerpts
    code: str
    prints: str | None
    excerpt_of: str | None


def blocks_of(page):
    """Return the Python blocks of a page, in order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    framework = [RUNS_ON.get(each, each) for each in IMPORT.findall(text)[:1]]
    blocks = []
    for fence in FENCE.finditer(text):
        if fence["kind"] == "text" and blocks and blocks[-1].prints is None:
            blocks[-1] = blocks[-1]._replace(prints=fence["text"])
        if fence["kind"] != "python":
            continue
        found = IMPORT.findall(fence["text"])[:1]
        framework = [RUNS_ON.get(each, each) for each in found] or framework
        if not framework and not fence["source"]:
            raise ValueError(f"{page}: no block imports negcache, so none can be run")
        line = text.count("\n", 0, fence.start("text"))
        blocks.append(Block(line, "".join(framework), fence["text"], None, fence["source"]))
    return blocks


def run(page, framework):
    """Run one framework's blocks of a page; yield (line, what it printed)."""
    namespace = {}
    for block in blocks_of(page):
        if block.framework != framework or block.excerpt_of:
            continue
        if IMPORT.search(block.code):
            namespace = {"__name__": "__main__"}
        # At its own line, so that a traceback, and whoever reads a function's source, finds it.
        source = "\n" * block.line + block.code
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(source, ROOT / page, "exec"), namespace)  # noqa: S102
        yield block.line, printed.getvalue()


def main(framework, *pages):
    """Run pages; the core's are looked through for `>>>` examples too."""
    for page in pages:
        for line, printed in run(page, framework):
            print(json.dumps([page, line, printed]), flush=True)  # noqa: T201
        if framework == "negcache_core":
            failed, _ = doctest.testfile(str(ROOT / page), module_relative=False)
            if failed:
                sys.exit(f"{page}: an example prints something else")


if __name__ == "__main__":
    main(*sys.argv[1:])
