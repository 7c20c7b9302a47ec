"""The programs of the README and of the documentation run as printed, and links lead somewhere."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from run_pages import ROOT, blocks_of

README = (ROOT / "README.md").read_text()
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    *sorted(str(page.relative_to(ROOT)) for page in ROOT.glob("docs/*.md")),
]
BLOCKS = {page: blocks_of(page) for page in PAGES}
NUMBER = re.compile(r"\d+(?:\.\d+)?")


def test_each_framework_has_its_quickstart():
    frameworks = ["negcache_torch", "negcache_tensorflow", "negcache_jax"]
    assert [block.framework for block in BLOCKS["README.md"]] == frameworks[:1]
    for name, framework in zip(("pytorch", "tensorflow", "jax"), frameworks, strict=True):
        blocks = BLOCKS[f"docs/quickstart-{name}.md"]
        assert {block.framework for block in blocks} == {framework}
        assert any(block.prints for block in blocks)


# One process for a framework: its import takes longer than most pages.
@pytest.mark.parametrize(
    "framework", sorted({block.framework for blocks in BLOCKS.values() for block in blocks} - {""})
)
def test_programs_run_as_printed(framework, tmp_path):
    pages = [
        page
        for page, blocks in BLOCKS.items()
        if framework in {block.framework for block in blocks} or framework == "negcache_core"
    ]
    out = subprocess.run(
        [sys.executable, Path(__file__).with_name("run_pages.py"), framework, *pages],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
        cwd=tmp_path,  # where programs may leave files
        # Threads of small operations wait for each other on a busy machine.
        env={**os.environ, "OMP_NUM_THREADS": "1", "JAX_ENABLE_X64": "0"},
    )
    assert out.returncode == 0, out.stderr[-3000:]
    printed = {(page, line): text for page, line, text in map(json.loads, out.stdout.splitlines())}
    expected = {
        (page, block.line): block.prints
        for page in pages
        for block in BLOCKS[page]
        if block.framework == framework and not block.excerpt_of
    }
    assert printed.keys() == expected.keys()
    for place, text in expected.items():
        if place[0] == "README.md":
            check_summary(printed[place])
        elif text is not None:
            check_printed(printed[place], text, place)


def check_summary(printed):
    loss, items = re.fullmatch(r"loss ([\d.]+) against (\d+) items\n", printed).groups()
    assert 0 < float(loss) < 20
    # The metrics speak of the cache before the last step's items came in.
    assert int(items) == 19 * 32


def check_printed(printed, text, place):
    """Words as on the page, and numbers nearly: processors and standard libraries differ.

    Where the page begins with an ellipsis, it shows the last lines only.
    """
    if text.startswith("…\n"):
        text = text.removeprefix("…\n")
        printed = "\n".join(printed.splitlines()[-text.count("\n") :])
    assert NUMBER.sub("#", printed).split() == NUMBER.sub("#", text).split(), place
    given, promised = ([float(each) for each in NUMBER.findall(part)] for part in (printed, text))
    assert given == pytest.approx(promised, rel=0.2, abs=0.01), place


def test_excerpts_stand_in_the_program_that_they_are_from():
    excerpts = [block for blocks in BLOCKS.values() for block in blocks if block.excerpt_of]
    assert excerpts
    for block in excerpts:
        program = (ROOT / block.excerpt_of).read_text()
        assert bare(block.code) in bare(program), f"not in {block.excerpt_of}:\n{block.code}"


def bare(code):
    """Return code without prompts and layout, which the formatter may change."""
    code = re.sub(r"^ *(?:>>>|\.\.\.) ?", "", code, flags=re.MULTILINE)
    return re.sub(r",(?=[)\]}])", "", re.sub(r"\s+", "", code))


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    targets = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    targets = [link for link in targets if not link.startswith("../../actions/")]  # on GitHub
    assert [link for link in targets if not ((ROOT / page).parent / link).exists()] == []


def test_the_patent_notice_stands():
    for page in ("README.md", "docs/patents.md"):
        text = " ".join((ROOT / page).read_text().split())
        assert "US 12,619,922 B2" in text
        assert "granted 2026-05-05" in text or "granted on 2026-05-05" in text
