"""What a text says, apart from the prompt before it and the tokens around it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._known import NO_TEXT
from ._tokens import MASK, TOKENS, _as_rows, text_ids

_AROUND = ("cls_token_id", "sep_token_id", "bos_token_id", "eos_token_id", "pad_token_id")


class Contents(NamedTuple):
    """Tells texts apart by what they say.

    special: ids of the tokens that stand around every text
    """

    special: tuple[int, ...]

    @classmethod
    def of(cls, model: Any) -> "Contents":
        """Ask the model's tokenizer, if it has one that knows."""
        tokenizer = getattr(model, "tokenizer", None)
        found = (getattr(tokenizer, name, None) for name in _AROUND)
        return cls(tuple(sorted({each for each in found if each is not None})))

    def ids(self, features: Mapping[str, Any]) -> Tensor:
        """Return int64 (n,): equal for equal texts, whatever their prompts; NO_TEXT for none."""
        rows, facts = _as_rows(features)
        tokens, live = rows[TOKENS], rows[MASK].bool()
        prompt = torch.as_tensor(facts.get("prompt_length", 0), device=live.device).flatten()[:1]
        around = torch.as_tensor(self.special, dtype=tokens.dtype, device=live.device)
        live = live & (live.cumsum(1) > prompt) & ~torch.isin(tokens, around)
        return torch.where(live.any(1), text_ids(tokens, live), NO_TEXT)
