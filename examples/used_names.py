"""Recommender data from installed Python source: functions, and the names that they use.

A user is a function. Its items are the attributes that it reads and the names that it calls.
"""

import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from installed_source import source_files

KNOWN = 32  # the most names in a user's query
WORDS, BUCKETS = 6, 4_096  # words of a name, hashed
ROWS_PER_USER = 3
LEAST_USERS = 5  # fewest users of a name that counts as an item
HELD_OUT = 2_000  # at most: users for validation, and as many for the test

_PACKAGES = ("numpy", "keras")
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "testing"}

# Docstrings, strings and comments: they are not code, and their brackets would mislead.
_TEXT = re.compile(
    r"('''|\"\"\").*?\1|'(?:\\.|[^'\\\n])*'|\"(?:\\.|[^\"\\\n])*\"|#[^\n]*", re.DOTALL
)
_NAME = re.compile(r"[^\W\d]\w+")
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_FUNCTION = re.compile(r"^[ \t]*(?:async[ \t]+)?def[ \t]+", re.MULTILINE)
_USED = re.compile(r"\.([^\W\d]\w{2,})|\b([^\W\d]\w{2,})\(")


class Users(NamedTuple):
    """The known items of n users, and one more item of each, which is to be found.

    known:  int32 (n, KNOWN), item numbers, padded with 0
    answer: int32 (n,), the number of the item to find; it is not in its row of `known`
    """

    known: np.ndarray
    answer: np.ndarray


class Interactions(NamedTuple):
    """Users with their items. Item number 0 means none, and pads rows.

    items:    field -> (items, …): "item", their numbers; "words", int32 (items, WORDS), hashed; and
              "log_q", the log of an item's share of the training answers
    train:    up to ROWS_PER_USER rows per user
    validation, test: one row per user; their functions are in files that are not used in training
    """

    names: list[str]
    items: dict[str, np.ndarray]
    train: Users
    validation: Users
    test: Users


def mine(max_users: int | None = None) -> Interactions:
    """Read the functions of the standard library, NumPy and Keras, without their tests.

    Of every ten files, one is for validation and one for the test. Stops reading at `max_users`.
    """
    users: dict[frozenset[str], int] = {}  # the names in a function -> hash of its file's path
    for path, base in source_files(_PACKAGES, _SKIPPED):
        if path.stem.endswith("_test"):
            continue
        place = zlib.crc32(path.relative_to(base).as_posix().encode())
        for names in used_names(code_of(path.read_text(encoding="utf-8", errors="replace"))):
            users.setdefault(names, place)
        if max_users is not None and len(users) >= max_users:
            break
    counts = Counter(name for names in users for name in names)
    names = ["", *sorted(name for name, count in counts.items() if count >= LEAST_USERS)]
    number = {name: row for row, name in enumerate(names)}
    rng = np.random.default_rng(0)
    parts: dict[str, list[tuple[np.ndarray, int]]] = {"train": [], "validation": [], "test": []}
    for found, place in users.items():
        numbers = rng.permutation(sorted(number[name] for name in found if name in number))
        part = {0: "validation", 1: "test"}.get(place % 10, "train")
        most = ROWS_PER_USER if part == "train" else 1
        for row in range(min(most, len(numbers) - 3)):
            others = np.delete(numbers, row)[:KNOWN]
            parts[part].append((np.pad(others, (0, KNOWN - len(others))), numbers[row]))
    train = _users(parts["train"])
    share = np.bincount(train.answer, minlength=len(names)).clip(1) / len(train.answer)
    items = {
        "item": np.arange(len(names), dtype=np.int32),
        "words": np.stack([_words(name) for name in names]),
        "log_q": np.log(share).astype(np.float32),
    }
    held_out = (
        _users([parts[part][row] for row in rng.permutation(len(parts[part]))[:HELD_OUT]])
        for part in ("validation", "test")
    )
    return Interactions(names, items, train, *held_out)


def code_of(text: str) -> str:
    """Return source without comments and docstrings, and with only the words of strings.

    >>> code_of("f('one two', 1)  # why")
    'f("one two", 1)  '
    """
    return _TEXT.sub(_without_text, text)


def used_names(code: str) -> Iterator[frozenset[str]]:
    """Yield the names that each function uses, if there are at least four.

    >>> [sorted(names) for names in used_names("def f(a): a.one.two(len(a), max(a.three))")]
    [['len', 'max', 'one', 'three', 'two']]
    """
    for function in _FUNCTION.split(code)[1:]:
        names = frozenset(one or other for one, other in _USED.findall(function))
        if len(names) >= 4:
            yield names


def _without_text(match: re.Match[str]) -> str:
    text = match.group()
    if text.startswith("#"):
        return ""
    return '""' if match.group(1) else f'"{" ".join(_NAME.findall(text))}"'


def _users(rows: Sequence[tuple[np.ndarray, int]]) -> Users:
    if not rows:
        raise SystemExit("There are too few functions to hold some out: raise --max-users.")
    known, answer = zip(*rows, strict=True)
    return Users(np.stack(known).astype(np.int32), np.asarray(answer, np.int32))


def _words(name: str) -> np.ndarray:
    # crc32 is the same in every process; Python's own hash of a string is not.
    found = [zlib.crc32(word.lower().encode()) % (BUCKETS - 1) + 1 for word in _WORD.findall(name)]
    return np.pad(np.asarray(found[:WORDS], np.int32), (0, WORDS - len(found[:WORDS])))
