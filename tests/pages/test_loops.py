"""An in-batch training loop becomes a cached one by a few lines, which the front page shows."""

import difflib
import re
import runpy
from pathlib import Path

import pytest

from negcache_core import EMPTY

ROOT = Path(__file__).parents[2]
BEFORE, AFTER = (ROOT / "examples" / f"{name}_loop.py" for name in ("in_batch", "cached"))
SHOWN = re.compile(r"^<!-- from (\S+) to (\S+) -->\n```diff\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def lines_of(path):
    return path.read_text().splitlines()


def changes(before, after):
    """Return the lines that go and those that come, for each place where the texts differ."""
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    return [
        (before[start:end], after[begin:stop])
        for tag, start, end, begin, stop in matcher.get_opcodes()
        if tag != "equal"
    ]


def test_changes_are_counted():
    assert changes(["a", "b", "c"], ["a", "B", "c", "d"]) == [(["b"], ["B"]), ([], ["d"])]


def test_at_most_four_lines_differ():
    found = changes(lines_of(BEFORE), lines_of(AFTER))
    assert sum(max(len(gone), len(come)) for gone, come in found) <= 4
    assert sum(len(gone) for gone, _ in found) <= 4
    assert 1 <= sum(len(come) for _, come in found) <= 4


def test_the_page_shows_that_difference():
    before, after, text = SHOWN.search((ROOT / "docs" / "index.md").read_text()).groups()
    assert (ROOT / before, ROOT / after) == (BEFORE, AFTER)
    found = changes(lines_of(BEFORE), lines_of(AFTER))
    expected = [
        line
        for gone, come in found
        for line in (*(f"-{line}" for line in gone), *(f"+{line}" for line in come))
    ]
    shown = text.splitlines()
    assert [line for line in shown if line[0] in "+-"] == expected
    around = [line[1:] for line in shown if line[0] == " "]
    assert set(around) <= set(lines_of(BEFORE)) & set(lines_of(AFTER))
    assert all(line[0] in "+- " or line == "…" for line in shown)


@pytest.mark.parametrize("program", [BEFORE, AFTER], ids=["in_batch", "cached"])
def test_it_runs_and_an_evaluation_leaves_no_trace(program, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "examples")
    names = runpy.run_path(str(program))
    printed = capsys.readouterr().out
    last = "epoch 4: held-out loss {:.2f}, recall@10 {:.3f}"
    for _ in range(2):
        assert printed.splitlines()[-1] == last.format(*names["evaluate"]())
    recalls = [float(each) for each in re.findall(r"recall@10 ([\d.]+)", printed)]
    assert recalls[-1] > 10 * 10 / len(names["items"])  # ten times what chance finds
    if program == AFTER:
        cache = names["loss_fn"].cache
        assert (cache.age < EMPTY).all()
        assert set(cache.data["row"].tolist()) <= set(names["train_rows"].tolist())
