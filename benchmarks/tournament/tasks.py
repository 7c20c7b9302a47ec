"""The tasks: a sentence and the Python function, or the shell command, that it describes."""

import re
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from docstring_pairs import NAME_REPEATS, is_held_out, mine_pairs, words

from .more_tasks import lines, recommender
from .task import Questions, Task
from .texts import BUCKETS, tokens_of

PARTS = ("train", "dev", "test")  # to train on, to choose by, to report
QUERY_TOKENS, CODE_TOKENS, COMMAND_TOKENS = 96, 256, 96
# Flags and operators say as much in a command as names do.
_COMMAND_WORD = re.compile(r"--?[A-Za-z][\w-]*|[A-Za-z]+|\d+|[|><&;$*?{}!\\]")


def docstrings(_: Path | None) -> Task:
    """Return the demo's pairs; a tenth of the queries, by hash, are held out.

    Half of these, by hash too, are for validation.
    """
    pairs = mine_pairs()
    part = np.asarray([part_of(pair.query) for pair in pairs])
    train, validation, test = (np.flatnonzero(part == name) for name in PARTS)
    code = ([*words(pair.name) * NAME_REPEATS, *dict.fromkeys(words(pair.code))] for pair in pairs)
    return Task(
        queries=tokens_of((dict.fromkeys(words(pair.query)) for pair in pairs), QUERY_TOKENS),
        items=tokens_of(code, CODE_TOKENS),
        item_of=np.arange(len(pairs)),
        train=train,
        validation=Questions(validation, validation[:, None]),
        test=Questions(test, test[:, None]),
        query_buckets=BUCKETS,
        item_buckets=BUCKETS,
    )


def part_of(query: str) -> str:
    """Return the part of the docstrings that a query belongs to."""
    if not is_held_out(query):
        return "train"
    # The last digit decides what is held out; the one before it is unused.
    return ("dev", "test")[zlib.crc32(" ".join(words(query)).encode()) // 10 % 2]


def nl2bash(folder: Path | None) -> Task:
    """Return NL2Bash: requests and shell commands, with the split of its files.

    folder: holds train.tsv, dev.tsv and test.tsv, each line a request, a tab and a command

    The gallery is all distinct commands of the three files. A request may have several right ones.
    """
    if folder is None:
        raise SystemExit("nl2bash needs --nl2bash, the folder that holds its files.")
    parts = read_nl2bash(folder)
    pairs = [pair for part in parts.values() for pair in part]
    commands = {command: row for row, command in enumerate(dict.fromkeys(c for _, c in pairs))}
    first = {request: row for row, (request, _) in reversed(list(enumerate(pairs)))}
    return Task(
        queries=tokens_of((dict.fromkeys(words(request)) for request, _ in pairs), QUERY_TOKENS),
        items=tokens_of(
            ([word.lower() for word in _COMMAND_WORD.findall(command)] for command in commands),
            COMMAND_TOKENS,
        ),
        item_of=np.asarray([commands[command] for _, command in pairs]),
        train=np.arange(len(parts["train"])),
        validation=_questions(parts["dev"], first, commands),
        test=_questions(parts["test"], first, commands),
        query_buckets=BUCKETS,
        item_buckets=BUCKETS,
    )


def _questions(
    pairs: list[tuple[str, str]], row_of: dict[str, int], commands: dict[str, int]
) -> Questions:
    right: dict[str, list[int]] = {}
    for request, command in pairs:
        right.setdefault(request, []).append(commands[command])
    most = max(map(len, right.values()))
    return Questions(
        rows=np.asarray([row_of[request] for request in right]),
        answers=np.asarray([rows + rows[:1] * (most - len(rows)) for rows in right.values()]),
    )


def read_nl2bash(folder: Path) -> dict[str, list[tuple[str, str]]]:
    """Return the requests and commands of the three files."""
    parts: dict[str, list[tuple[str, str]]] = {}
    for name in PARTS:
        with (folder / f"{name}.tsv").open(encoding="utf-8", newline="\n") as file:
            split = (line.rstrip("\n").split("\t") for line in file)
            parts[name] = [(request, command) for request, command in split]
    return parts


TASKS: dict[str, Callable[[Path | None], Task]] = {
    "docstrings": docstrings,
    "nl2bash": nl2bash,
    "lines": lines,
    "recommender": recommender,
}
