"""Two real search tasks: a sentence and the Python function, or the shell command, it describes."""

import re
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "examples"))  # the demo's model and pairs are what is measured

from docstring_pairs import (  # noqa: E402 - after its folder is known
    Data,
    as_data,
    mine_pairs,
    token_ids,
    words,
)

COMMAND_WORDS, REQUEST_WORDS = 64, 64
# Flags and operators say as much in a command as names do.
_COMMAND_WORD = re.compile(r"--?[A-Za-z][\w-]*|[A-Za-z]+|\d+|[|><&;$*?{}!\\]")


def docstrings(_: Path) -> Data:
    """Return the demo's pairs; a tenth of the queries, by hash, are held out."""
    return as_data(mine_pairs())


def nl2bash(folder: Path) -> Data:
    """Return NL2Bash: requests and shell commands, with the split of its files.

    folder: holds train.tsv, dev.tsv and test.tsv, each line a request, a tab and a command

    The gallery is all distinct commands of the three files. A request may have several right ones.
    """
    parts = {name: _read_pairs(folder / f"{name}.tsv") for name in ("train", "dev", "test")}
    pairs = [pair for part in parts.values() for pair in part]
    commands = {command: row for row, command in enumerate(dict.fromkeys(c for _, c in pairs))}
    right: dict[str, list[int]] = {}
    for request, command in parts["test"]:
        right.setdefault(request, []).append(commands[command])
    first = {request: row for row, (request, _) in reversed(list(enumerate(pairs)))}
    most = max(map(len, right.values()))
    return Data(
        queries=token_ids((dict.fromkeys(words(request)) for request, _ in pairs), REQUEST_WORDS),
        items=token_ids(
            ([word.lower() for word in _COMMAND_WORD.findall(command)] for command in commands),
            COMMAND_WORDS,
        ),
        item_of=np.asarray([commands[command] for _, command in pairs]),
        train=np.arange(len(parts["train"])),
        held_out=np.asarray([first[request] for request in right]),
        answers=np.asarray([rows + rows[:1] * (most - len(rows)) for rows in right.values()]),
    )


def _read_pairs(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8", newline="\n") as file:
        return [line.rstrip("\n").split("\t") for line in file]


TASKS = {"docstrings": docstrings, "nl2bash": nl2bash}
