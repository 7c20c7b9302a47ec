"""Facts about all texts of a batch (prompt length, task, …), as a few numbers in each row."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from negcache_torch import KindError, OptionError
from torch import Tensor

FACTS, PROMPT = "facts", "prompt_length"
WORDS = 12  # int64 numbers of a row's facts
_PLAIN = {"modality": "text"}  # what a text is by default


def split(
    given: Mapping[str, Any], count: int, device: torch.device
) -> tuple[list[dict[str, Any]], Tensor]:
    """Return the distinct facts of a batch's texts, and the index of each text's, (n,).

    given: what a batch has besides its rows; a prompt's length may be a tensor, one number or (n,)

    Raises KindError for anything but text, numbers and None.
    """
    facts = dict(given)
    lengths = prompt_lengths(given, count, device)
    told = facts.pop(PROMPT, None) is not None
    for key, value in facts.items():
        if not _is_plain(value):
            raise KindError(
                f"the model's preprocess returns {key!r}, a {type(value).__name__}: besides "
                "tokens and masks, a row can store only strings, numbers and None. Leave it "
                "out, or express it in these."
            )
    if not told:
        return [facts], lengths
    distinct, which = lengths.unique(return_inverse=True)
    return [{**facts, PROMPT: length} for length in distinct.tolist()], which


def prompt_lengths(given: Mapping[str, Any], count: int, device: torch.device) -> Tensor:
    """Return int64 (n,): how many tokens the prompt of each text has; 0 if unknown."""
    lengths = given.get(PROMPT)
    lengths = torch.as_tensor(0 if lengths is None else lengths, device=device)
    if lengths.is_floating_point() or (lengths.numel() != 1 and lengths.shape != (count,)):
        raise KindError(
            f"{PROMPT!r} is {lengths.dtype} of shape {tuple(lengths.shape)}: expected an integer, "
            f"or one for each of the {count} texts."
        )
    return lengths.long().reshape(-1).expand(count)


def encode(
    form: list[Any],
    facts: Mapping[str, Any],
    words: int = WORDS,
    advice: str = "give the model's tasks shorter names",
) -> Tensor:
    """Return int64 (words,): the form of a row's features and the facts about it, as JSON.

    This stores the text itself, not numbers for it, so a row means the same in another process
    and after a restart. Raises OptionError for facts that are too long.
    """
    letters, room = _json([form, facts]), 8 * words
    if len(letters) > room:
        raise OptionError(
            f"the model's facts about a batch take {len(letters)} bytes, {letters.decode()}, but "
            f"a row stores {room}: {advice}."
        )
    return torch.frombuffer(bytearray(letters.ljust(room)), dtype=torch.int64)


def decode(words: Tensor) -> list[str]:
    """Return the JSON in rows' words (n, WORDS)."""
    return [
        bytes(row).decode().rstrip() for row in words.cpu().contiguous().view(torch.uint8).tolist()
    ]


def parse(kind: str) -> tuple[list[Any], dict[str, Any]]:
    """Return the form and the facts in a JSON."""
    form, facts = json.loads(kind)
    return form, {key: tuple(v) if isinstance(v, list) else v for key, v in facts.items()}


def without_prompt(kind: str) -> str:
    """Return the JSON without the prompt length."""
    form, facts = json.loads(kind)
    facts.pop(PROMPT, None)
    return _json([form, facts]).decode()


def signature(facts: Mapping[str, Any]) -> int:
    """Return an int64 hash of facts, 0 if they say only that it is a text."""
    telling = {k: v for k, v in facts.items() if v and _PLAIN.get(k) != v}
    if not telling:
        return 0
    digest = hashlib.blake2b(_json(telling), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(isinstance(each, str) for each in value)
    return value is None or isinstance(value, str | int | float)
