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

QUERY_TOKENS, CODE_TOKENS, COMMAND_TOKENS = 96, 256, 96
# Flags and operators say as much in a command as names do.
_COMMAND_WORD = re.compile(r"--?[A-Za-z][\w-]*|[A-Za-z]+|\d+|[|><&;$*?{}!\\]")


def docstrings(_: Path | None) -> Task:
    """Return the demo's pairs; a tenth of the queries, by hash, are held out.

    Half of these, by hash too, are for validation.
    """
    pairs = mine_pairs()
    held_out = np.asarray([is_held_out(pair.query) for pair in pairs])
    # The last digit decides what is held out; the one before it is unused.
    digit = [zlib.crc32(" ".join(words(pair.query)).encode()) // 10 % 2 for pair in pairs]
    validation, test = (np.flatnonzero(held_out & (np.asarray(digit) == half)) for half in (0, 1))
    code = ([*words(pair.name) * NAME_REPEATS, *dict.fromkeys(words(pair.code))] for pair in pairs)
    return Task(
        queries=tokens_of((dict.fromkeys(words(pair.query)) for pair in pairs), QUERY_TOKENS),
        items=tokens_of(code, CODE_TOKENS),
        item_of=np.arange(len(pairs)),
        train=np.flatnonzero(~held_out),
        validation=Questions(validation, validation[:, None]),
        test=Questions(test, test[:, None]),
        query_buckets=BUCKETS,
        item_buckets=BUCKETS,
    )


def nl2bash(folder: Path | None) -> Task:
    """Return NL2Bash: requests and shell commands, with the split of its files.

    folder: holds train.tsv, dev.tsv and test.tsv, each line a request, a tab and a command

    The gallery is all distinct commands of the three files. A request may have several right ones.
    """
    if folder is None:
        raise SystemExit("nl2bash needs --nl2bash, the folder that holds its files.")
    parts = {name: _read_pairs(folder / f"{name}.tsv") for name in ("train", "dev", "test")}
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
    pairs: list[list[str]], row_of: dict[str, int], commands: dict[str, int]
) -> Questions:
    right: dict[str, list[int]] = {}
    for request, command in pairs:
        right.setdefault(request, []).append(commands[command])
    most = max(map(len, right.values()))
    return Questions(
        rows=np.asarray([row_of[request] for request in right]),
        answers=np.asarray([rows + rows[:1] * (most - len(rows)) for rows in right.values()]),
    )


def _read_pairs(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8", newline="\n") as file:
        return [line.rstrip("\n").split("\t") for line in file]


TASKS: dict[str, Callable[[Path | None], Task]] = {
    "docstrings": docstrings,
    "nl2bash": nl2bash,
    "lines": lines,
    "recommender": recommender,
}
