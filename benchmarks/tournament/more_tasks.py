"""Two tasks on the source code that `make test` installs: its next line, and the names it uses.

They are mined in less than a minute each, and kept: what is read depends on the installed versions.
"""

import re
import zlib
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
from installed_source import source_files
from used_names import code_of, used_names

from .keeping import kept
from .task import Questions, Task
from .texts import BUCKETS, GRAM, token

RESULTS = Path(__file__).parents[1] / "results" / "tasks"
PACKAGES = (
    *("jax", "keras", "numpy", "scipy", "sklearn", "sympy", "tensorflow", "torch"),
    "transformers",
)
HELD_OUT = 2_000  # queries of each of the two kinds

LINES = 300_000
QUERY_WORDS, ITEM_WORDS = 48, 32
CONTEXT = 3  # lines of code before the one that is looked for

KNOWN = 32  # names that a query has at most
ROWS_PER_USER = 3
LEAST_USERS = 3  # of a name

_BRACKET = re.compile(r"[()\[\]{}]")
_NAME = re.compile(r"[^\W\d]\w+")
_PART = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")


def lines(_: Path | None) -> Task:
    """Return the task to find a line of code by the three lines before it.

    An item is a logical line of at least four words, with comments and docstrings left out. All
    are distinct, and so are the queries. Queries of a file are either trained on or held out.
    """
    return kept(RESULTS / "lines.npz", _mine_lines)


def recommender(_: Path | None) -> Task:
    """Return the task to find a name that a function uses by the others that it uses.

    A user is a function, an item an attribute or a called name; both sides are numbers of names,
    from 1. Names of fewer than three users are left out. Files are either trained on or held out.
    """
    return kept(RESULTS / "recommender.npz", _mine_recommender)


def _mine_lines() -> Task:
    pairs: dict[str, tuple[str, ...]] = {}  # a line, and those before it
    places: list[int] = []
    seen = set()
    for place, text in _sources():
        before: tuple[str, ...] = ()
        for line in _logical_lines(text):
            long = len(_NAME.findall(line)) >= 4
            if long and len(before) == CONTEXT and line not in pairs and before not in seen:
                pairs[line] = before
                seen.add(before)
                places.append(place)
            before = (*before, line)[-CONTEXT:]
        if len(pairs) >= LINES:
            break
    # The nearest line comes first: where there are too many words, the farthest are cut off.
    queries = (" ".join(reversed(before)) for before in pairs.values())
    items = np.arange(len(pairs))
    return _split(
        queries=np.stack([_token_row(text, QUERY_WORDS) for text in queries]),
        items=np.stack([_token_row(text, ITEM_WORDS) for text in pairs]),
        item_of=items,
        places=np.asarray(places),
        query_buckets=BUCKETS,
        item_buckets=BUCKETS,
    )


def _mine_recommender() -> Task:
    users: dict[frozenset[str], int] = {}  # what a function uses, and the place of its file
    for place, text in _sources():
        for names in used_names(text):
            users.setdefault(names, place)
    counts = Counter(name for names in users for name in names)
    kept = sorted(name for name, count in counts.items() if count >= LEAST_USERS)
    number = {name: row + 1 for row, name in enumerate(kept)}
    rng = np.random.default_rng(0)
    queries, item_of, places = [], [], []
    for names, place in users.items():
        numbers = rng.permutation(sorted(number[name] for name in names if name in number))
        for row in range(min(ROWS_PER_USER, len(numbers) - 3)):
            others = np.delete(numbers, row)[:KNOWN]
            queries.append(np.pad(others, (0, KNOWN - len(others))))
            item_of.append(numbers[row] - 1)
            places.append(place)
    return _split(
        queries=np.stack(queries).astype(np.int32),
        items=np.arange(1, len(kept) + 1, dtype=np.int32)[:, None],
        item_of=np.asarray(item_of),
        places=np.asarray(places),
        query_buckets=len(kept) + 1,
        item_buckets=len(kept) + 1,
    )


def _sources() -> Iterator[tuple[int, str]]:
    """Yield each installed file's place, a hash of its path, and its code, in the places' order."""
    files = source_files(PACKAGES, ("site-packages", "dist-packages"))
    for place, path in sorted((_hash(str(path.relative_to(base))), path) for path, base in files):
        text = path.read_text(encoding="utf-8", errors="replace")
        yield place, code_of(text)


def _logical_lines(text: str) -> Iterator[str]:
    """Yield lines of code without indentation; those within brackets are one."""
    parts: list[str] = []
    depth = 0
    for line in text.split("\n"):
        if stripped := line.strip():
            parts.append(stripped.removesuffix("\\"))
            for bracket in _BRACKET.findall(stripped):
                depth += 1 if bracket in "([{" else -1
            if depth <= 0 and not stripped.endswith("\\"):
                yield " ".join(parts)
                parts, depth = [], 0


def _token_row(text: str, length: int) -> np.ndarray:
    """Return int32 (length,): hashes of names and their parts, then of their 4-grams as fit in."""
    found = [_tokens_of_name(name) for name in dict.fromkeys(_NAME.findall(text))]
    tokens = dict.fromkeys(each for kind in (0, 1) for name in found for each in name[kind])
    row = np.fromiter(tokens, np.int32)[:length]
    return np.pad(row, (0, length - len(row)))


@cache
def _tokens_of_name(name: str) -> tuple[list[int], list[int]]:
    small = name.lower()
    parts = [small, *(part.lower() for part in _PART.findall(name))]
    grams = [f"#{small[start : start + GRAM]}" for start in range(len(small) - GRAM + 1)]
    return [token(part) for part in parts], [token(gram) for gram in grams]


def _split(places: np.ndarray, **sides: np.ndarray | int) -> Task:
    """Hold out queries of files: of every ten places, one is to validate with, and one to test."""
    # Shuffled, since all rows of a file stand together.
    rows = np.random.default_rng(1).permutation(len(places))
    parts = [rows[places[rows] % 10 == part][:HELD_OUT] for part in (0, 1)]
    item_of = np.asarray(sides["item_of"])
    validation, test = (Questions(part, item_of[part][:, None]) for part in parts)
    return Task(
        **sides,  # type: ignore[arg-type] # arrays and numbers, each under its name
        train=np.flatnonzero(places % 10 > 1),
        validation=validation,
        test=test,
    )


def _hash(text: str) -> int:
    return zlib.crc32(text.encode())  # the same in every process
