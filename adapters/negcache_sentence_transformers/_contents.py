"""What a text says, apart from the prompt before it and the tokens around it."""

from typing import NamedTuple

import torch
from torch import Tensor

TEXT = "text"
NO_TEXT = torch.iinfo(torch.int64).min + 1  # the content of an empty text
_GAMMA = 0x9E3779B97F4A7C15 - 2**64  # odd 64-bit constants, as int64
_MIX = 0xBF58476D1CE4E5B9 - 2**64


class Around(NamedTuple):
    """The tokens that a model puts before and after each text, such as [CLS] and [SEP]."""

    head: Tensor
    tail: Tensor

    @classmethod
    def of(cls, blank: Tensor, text: Tensor) -> "Around":
        """Compare the tokens of an empty text with those of another."""
        same = min(len(blank), len(text))
        first = int((blank[:same] == text[:same]).long().cumprod(0).sum())
        return cls(blank[:first], blank[first:])

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
        return torch.where(said.any(1), text_ids(tokens, said), NO_TEXT)


NOTHING_AROUND = Around(torch.empty(0), torch.empty(0))


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
