"""Search pairs from installed Python source: a sentence, and the code it describes.

A query is the first sentence of a function's docstring; its item is the function's source without
docstrings. Queries and items become rows of token ids by hashing their words.
"""

import ast
import re
import warnings
import zlib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from installed_source import source_files
from tqdm import tqdm

BUCKETS = 32_768
PADDING = 0
QUERY_WORDS = 32
ITEM_WORDS = 128
NAME_REPEATS = 3  # on top of the `def` line: a function's name says most of what it does

_PACKAGES = ("numpy", "torch")
_SKIPPED_FOLDERS = {
    *("site-packages", "dist-packages"),  # packages are mined by name, not as standard library
    *("test", "tests", "idle_test", "testing"),  # their docstrings describe cases, not functions
}
_BLOCKS = ("body", "orelse", "finalbody", "handlers", "cases")
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?![a-z])")

_Function = ast.FunctionDef | ast.AsyncFunctionDef
_Documented = _Function | ast.ClassDef


class Data(NamedTuple):
    """Token ids of all queries (n, words) and of all items (m, words), 0 where a text has ended.

    item_of:         (n,) the row of each query's item
    train, held_out: the rows of the queries to train on, and of those to evaluate with
    answers:         (held out, P) rows of all correct items; short lists repeat one
    """

    queries: np.ndarray
    items: np.ndarray
    item_of: np.ndarray
    train: np.ndarray
    held_out: np.ndarray
    answers: np.ndarray


class Pair(NamedTuple):
    """A query; its item, a function's name and source; and where that is: 'ast.py:33'."""

    query: str
    name: str
    code: str
    where: str


def mine_pairs(limit: int | None = None) -> list[Pair]:
    """Return distinct pairs from the standard library, NumPy and PyTorch, always in the same order.

    If PyTorch is not installed, it uses the other two. No two queries have the same words, and no
    two items do, so nothing is both trained on and held out. Stops reading at `limit` pairs.
    """
    pairs, queries, items = [], set(), set()
    for path, base in tqdm(
        source_files(_PACKAGES, _SKIPPED_FOLDERS), desc="reading source files", unit="file"
    ):
        for pair in _pairs_of_file(path, base):
            query, item = tuple(words(pair.query)), tuple(words(pair.code))
            if 3 <= len(query) <= QUERY_WORDS and query not in queries and item not in items:
                queries.add(query)
                items.add(item)
                pairs.append(pair)
            if len(pairs) == limit:
                return pairs
    return pairs


def as_data(pairs: list[Pair]) -> Data:
    """Turn pairs into token ids, and split them by a hash of the query."""
    held_out = np.asarray([is_held_out(pair.query) for pair in pairs])
    if held_out.all() or not held_out.any():
        raise SystemExit(
            f"{len(pairs)} pairs leave nothing to train on or to hold out: raise --max-pairs."
        )
    return Data(
        queries=query_tokens(pair.query for pair in pairs),
        items=item_tokens(pairs),
        item_of=np.arange(len(pairs)),
        train=np.flatnonzero(~held_out),
        held_out=np.flatnonzero(held_out),
        answers=np.flatnonzero(held_out)[:, None],
    )


def batches(rows: np.ndarray, steps: int, batch_size: int, seed: int = 0) -> np.ndarray:
    """Return (steps, batch_size) of `rows`: repeated shuffles of all of them.

    A step's batch does not depend on the number of steps, so a run can be resumed.

    >>> batches(np.arange(3), 4, 2).shape
    (4, 2)
    """
    generator = np.random.default_rng(seed)
    wanted = steps * batch_size
    shuffles = [generator.permutation(rows) for _ in range(-(-wanted // len(rows)))]
    return np.concatenate(shuffles)[:wanted].reshape(steps, batch_size)


def words(text: str) -> list[str]:
    """Split text or code into lower-case words: identifiers are split at _ and at capitals.

    >>> words("def readHTTPBody_v2(self)")
    ['def', 'read', 'http', 'body', 'v', '2', 'self']
    """
    return [word.lower() for word in _WORD.findall(text)]


def query_tokens(queries: Iterable[str]) -> np.ndarray:
    """Return int32 (n, QUERY_WORDS): the token ids of each query's distinct words."""
    return token_ids((dict.fromkeys(words(query)) for query in queries), QUERY_WORDS)


def item_tokens(pairs: Iterable[Pair]) -> np.ndarray:
    """Return int32 (n, ITEM_WORDS): the token ids of each item's name and its distinct words."""
    items = ([*words(pair.name) * NAME_REPEATS, *dict.fromkeys(words(pair.code))] for pair in pairs)
    return token_ids(items, ITEM_WORDS)


def is_held_out(query: str) -> bool:
    """Return whether a query is held out for evaluation: a tenth are, by a hash of their words."""
    return zlib.crc32(" ".join(words(query)).encode()) % 10 == 0


def token_ids(texts: Iterable[Iterable[str]], length: int) -> np.ndarray:
    """Return int32 (texts, length): the hashes of each text's first words, then PADDING."""
    rows = []
    for text in texts:
        # crc32 is the same in every process; Python's own hash of a string is not.
        row = [zlib.crc32(word.encode()) % (BUCKETS - 1) + 1 for word in islice(text, length)]
        rows.append(row + [PADDING] * (length - len(row)))
    return np.asarray(rows, np.int32)


def _pairs_of_file(path: Path, base: Path) -> Iterator[Pair]:
    """Yield a pair for each documented function of a file; none if it does not parse."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's invalid escapes
            tree = ast.parse(text)
    except (OSError, SyntaxError, ValueError, RecursionError):
        return
    documented = [node for node in _definitions(tree) if ast.get_docstring(node, clean=False)]
    hidden = {line for node in documented for line in _docstring_lines(node)}
    lines = text.split("\n")
    for node in documented:
        if isinstance(node, _Function) and len(node.body) > 1:
            kept = [n for n in range(node.lineno, node.end_lineno + 1) if n not in hidden]
            yield Pair(
                query=_first_sentence(ast.get_docstring(node)),
                name=node.name,
                code="\n".join(lines[n - 1] for n in kept),
                where=f"{path.relative_to(base).as_posix()}:{node.lineno}",
            )


def _definitions(node: ast.AST) -> Iterator[_Documented]:
    """Yield all functions and classes; only statements hold them, so expressions are not walked."""
    for block in _BLOCKS:
        for child in getattr(node, block, ()):
            if isinstance(child, _Documented):
                yield child
            yield from _definitions(child)


def _docstring_lines(node: _Documented) -> range:
    """Return the line numbers of a docstring."""
    return range(node.body[0].lineno, node.body[0].end_lineno + 1)


def _first_sentence(docstring: str) -> str:
    paragraph = docstring.strip().split("\n\n")[0]
    return _SENTENCE_END.split(" ".join(paragraph.split()), maxsplit=1)[0]
