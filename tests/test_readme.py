"""The README's programs run as printed, and its links lead somewhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def name_of(block):
    return re.search(r"import (negcache_\w+)", block)[1]


def test_every_quickstart_are_there():
    assert [name_of(block) for block in BLOCKS] == [
        "negcache_torch",
        "negcache_tensorflow",
        "negcache_jax",
    ]


@pytest.mark.parametrize("block", BLOCKS, ids=name_of)
def test_quickstart_runs_as_printed(block):
    out = subprocess.run(
        [sys.executable, "-c", block], capture_output=True, text=True, timeout=300, check=False
    )
    assert out.returncode == 0, out.stderr[-3000:]
    loss, items = re.fullmatch(r"loss ([\d.]+) against (\d+) items\n", out.stdout).groups()
    assert 0 < float(loss) < 20
    # The torch metrics speak of the cache before the last step's items came in.
    assert int(items) in (19 * 32, 20 * 32)


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "CONTRIBUTING.md",
        *(str(page.relative_to(ROOT)) for page in ROOT.glob("docs/*.md")),
    ],
)
def test_relative_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    targets = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    assert [link for link in targets if not ((ROOT / page).parent / link).exists()] == []


def test_the_patent_notice_stands():
    assert "US 12,619,922 B2" in README
    assert "granted\n2026-05-05" in README or "granted 2026-05-05" in README
