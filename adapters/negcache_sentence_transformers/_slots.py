"""How many tokens a slot of the cache holds, and what that costs."""

import logging
from collections.abc import Mapping
from typing import Any

from negcache_torch import FieldSpec, OptionError

from negcache_core.arrays.words import bytes_of

logger = logging.getLogger(__name__)
_LONG = 1_024  # tokens: beyond this, do not use a length without telling the user
_SHARE = 2**30  # bytes that tokens may take without asking the user
_AGE_BYTES = 4
_NO_LIMIT = 2**24  # tokenizers without a limit report 1e30


def slot_length(model: Any, max_length: int | Mapping[str, int] | None, token_bytes: int) -> int:
    """Return the most tokens of a text: the given number, else what the model allows.

    max_length:  a number, or one per task, as in training arguments
    token_bytes: bytes that a token takes in a slot, with masks and types
    """
    if max_length is None:
        length = model.max_seq_length
        if length is None or not length < _NO_LIMIT:
            raise OptionError(
                f"the model's max_seq_length is {length}, but a cache stores rows of one length: "
                "pass max_length, the most tokens that a text may have. Each token takes "
                f"{token_bytes} bytes in every slot: {256 * token_bytes:,} bytes a slot for 256."
            )
        return _checked(length, "the model's max_seq_length")
    if isinstance(max_length, Mapping) and max_length:
        return max(_checked(each, "max_length") for each in max_length.values())
    return _checked(max_length, "max_length")


def tell_cost(specs: Mapping[str, FieldSpec], cache_size: int, length: int) -> None:
    """Report what slots of the longest allowed length cost, before they take memory.

    Raises OptionError if their tokens take more than a gibibyte; a smaller cost is logged.
    """
    if length <= _LONG or not isinstance(cache_size, int):
        return  # the manager refuses what is not a size
    slot = sum(map(bytes_of, specs.values()))
    tokens = sum(bytes_of(spec) for spec in specs.values() if spec.shape == (length,))
    text = (
        f"the model allows {length:,} tokens, so a slot takes {slot:,} bytes, {tokens:,} of them "
        f"for tokens and masks, and {cache_size:,} slots take {slot * cache_size / 1e6:,.0f} MB"
    )
    advice = "set max_length to the most tokens that any of your texts has"
    if tokens * cache_size > _SHARE:
        raise OptionError(f"{text}: {advice}, or pass max_length={length} to accept that.")
    logger.warning("%s: %s.", text[0].upper() + text[1:], advice)


def slot_bytes(specs: Mapping[str, FieldSpec]) -> int:
    """Return the bytes of a slot, its age included."""
    return _AGE_BYTES + sum(map(bytes_of, specs.values()))


def _checked(length: Any, name: str) -> int:
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise OptionError(f"{name} is {length!r}: expected a positive number of tokens.")
    return length
