"""Texts as token numbers: their words and the words' 4-grams, hashed."""

import zlib
from collections.abc import Iterable
from functools import cache
from itertools import chain

import numpy as np

BUCKETS = 65_536
GRAM = 4


def tokens_of(texts: Iterable[Iterable[str]], length: int) -> np.ndarray:
    """Return int32 (texts, length): hashes of each text's words, then of their 4-grams, then 0.

    texts: each the words of one text, in order; a word that occurs twice counts twice

    Words come first, so `length` cuts off 4-grams before words.
    """
    rows = []
    for text in texts:
        found = [_hashes(word) for word in text]
        grams = dict.fromkeys(chain.from_iterable(each[1:] for each in found))
        row = [*(each[0] for each in found), *grams][:length]
        rows.append(row + [0] * (length - len(row)))
    return np.asarray(rows, np.int32)


@cache
def _hashes(word: str) -> tuple[int, ...]:
    """Return the number of a word, then those of its 4-grams, if it is long enough for some."""
    ends = f"<{word}>"
    grams = range(len(ends) - GRAM + 1) if len(word) >= GRAM else ()
    return tuple(map(token, [word, *(f" {ends[start : start + GRAM]}" for start in grams)]))


def token(text: str) -> int:
    """Return the number of a word or a 4-gram, from 1."""
    # crc32 is the same in every process; Python's own hash of a string is not.
    return zlib.crc32(text.encode()) % (BUCKETS - 1) + 1
