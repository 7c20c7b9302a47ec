"""The content of a text, without its prompt and the tokens around it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from negcache_torch import KindError
from torch import Tensor

TEXT = "text"
NO_TEXT = torch.iinfo(torch.int64).min + 1  # the content of an empty text
_GAMMA = 0x9E3779B97F4A7C15 - 2**64  # odd 64-bit constants, as int64
_MIX = 0xBF58476D1CE4E5B9 - 2**64


class Around(NamedTuple):
    """The tokens that a route puts before and after each text, such as [CLS] and [SEP].

    words: a hash of one tokenised text, which identifies the tokenizer: if routes have different
           tokenizers, equal numbers mean different words
    """

    head: Tensor
    tail: Tensor
    words: int = 0

    @classmethod
    def of(cls, blank: Tensor, text: Tensor) -> "Around":
        """Compare the tokens of an empty text with those of one text, the same for all routes."""
        same = min(len(blank), len(text))
        first = int((blank[:same] == text[:same]).long().cumprod(0).sum())
        said = text[None, first : len(text) - len(blank) + first]
        words = text_ids(said, torch.ones_like(said))
        return cls(blank[:first], blank[first:], int(words))

    def contents(self, tokens: Tensor, live: Tensor, prompts: Tensor) -> Tensor:
        """Return int64 (n,): equal for equal texts, whatever their prompts; NO_TEXT for none.

        tokens, live: (n, T); prompts: (n,) how many tokens each text's prompt has, those before it
        included
        """
        head, tail = self.head.to(tokens), self.tail.to(tokens)
        from_start = live.cumsum(1)
        left_out = from_start <= prompts[:, None]
        if len(head):
            expected = head[(from_start - 1).clamp(0, len(head) - 1)]
            left_out |= (from_start <= len(head)) & (tokens == expected)
        if len(tail):
            from_end = live.sum(1, keepdim=True) - from_start + 1  # 1 is a text's last token
            expected = tail[(len(tail) - from_end).clamp(0, len(tail) - 1)]
            left_out |= (from_end <= len(tail)) & (tokens == expected)
        said = live & ~left_out
        return torch.where(said.any(1), text_ids(tokens, said) ^ self.words, NO_TEXT)


NOTHING_AROUND = Around(torch.empty(0), torch.empty(0))


def ids_of_others(features: Mapping[str, Any]) -> Tensor:
    """Return int64 (B,): equal for equal images, or other items that are not texts.

    Zeros at the end of an axis, such as padding, do not count.

    Raises KindError if no tensor has a row for each of them.
    """
    given = [
        (key, value)
        for key, value in sorted(features.items())
        if isinstance(value, Tensor) and value.ndim > 0
    ]
    if not given or any(len(value) != len(given[0][1]) for _, value in given):
        raise KindError(
            f"the anchors have {sorted(features)}: expected tokens, or tensors of B rows each, "
            "to recognise equal anchors by."
        )
    found = torch.zeros((), dtype=torch.int64, device=given[0][1].device)
    for _, value in given:
        exact = value.contiguous().float().view(torch.int32) if value.is_floating_point() else value
        factors = torch.full((1,), _GAMMA, dtype=torch.int64, device=value.device)
        for size in value.shape[1:]:
            place = torch.arange(1, size + 1, device=value.device) * _GAMMA
            factors = _mixed(factors[..., None] + (place ^ (place >> 29)))
        own = (exact.long() * (factors | 1)).reshape(len(value), -1).sum(1)
        found = _mixed(found ^ _mixed(own))
    return found


def text_ids(tokens: Tensor, mask: Tensor) -> Tensor:
    """Return int64 (n,): a hash of each text's tokens (n, T), wherever its padding is.

    Two texts with the same tokens are one item to the model. Different ones have the same hash with
    probability 2 ** -64.
    """
    live = mask.bool()
    mixed = tokens.long() + live.cumsum(1) * _GAMMA
    for _ in range(2):
        mixed = (mixed ^ (mixed >> 29)) * _MIX
    return torch.where(live, mixed ^ (mixed >> 32), 0).sum(1)


def _mixed(value: Tensor) -> Tensor:
    value = (value ^ (value >> 29)) * _MIX
    return value ^ (value >> 32)
