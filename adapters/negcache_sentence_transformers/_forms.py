"""The forms in which models take texts: padded, end to end, or packed for flash attention."""

from collections.abc import Mapping
from typing import Any

import torch
from negcache_torch import KindError
from torch import Tensor

from ._facts import PROMPT

TOKENS, MASK = "input_ids", "attention_mask"
_OFFSETS, _COUNTS = "offsets", "sentence_lengths"
_ENDS = ("cu_seq_lens_q", "cu_seq_lens_k")  # 0, and where each text ends
_LONGEST = ("max_length_q", "max_length_k")
_POSITIONS, _TEXT = "position_ids", "seq_idx"
_PACKED = (*_ENDS, *_LONGEST, _POSITIONS, _TEXT)
MADE_WITH = "made_with"  # where a column records, in JSON, how preprocess was called
_RESULTS = {"sentence_embedding", "token_embeddings", "all_layer_embeddings"}  # of an earlier pass
_NO_FEATURES = {MADE_WITH, *_RESULTS}


def to_rows(
    features: Mapping[str, Any],
) -> tuple[dict[str, Tensor], list[Any], dict[str, Any]]:
    """Return what is (texts, tokens), the form it had, and everything else.

    A form is its name, the number of a text's first position, and the names of the features of its
    kind that it lacks. Raises KindError for features that are not tokens.
    """
    given = {key: value for key, value in features.items() if key not in _NO_FEATURES}
    form: list[Any] = ["padded", 0]
    if _ENDS[0] in given and TOKENS in given:
        tokens = given.pop(TOKENS).reshape(-1)
        form = ["packed", 0, *(key for key in _PACKED if key not in given)]
        packed = {key: given.pop(key) for key in _PACKED if key in given}
        if _POSITIONS in packed and len(tokens):
            form[1] = int(packed[_POSITIONS].flatten()[0])
        given |= _padded(tokens, packed[_ENDS[0]].diff())
    elif _OFFSETS in given and TOKENS in given:
        tokens, starts = given.pop(TOKENS), given.pop(_OFFSETS)
        form = ["flat", 0]
        given |= _padded(tokens, torch.cat([starts, starts.new_tensor([len(tokens)])]).diff())
    elif _COUNTS in given:
        del given[_COUNTS]  # the mask has it
        form = ["counted", 0]
    shape = getattr(given.get(TOKENS), "shape", None)
    rows = {k: v for k, v in given.items() if isinstance(v, Tensor) and k != PROMPT}
    if MASK not in rows or any(value.shape != shape for value in rows.values()):
        raise KindError(
            f"the model turns a text into {sorted(given)}: expected {TOKENS!r} and {MASK!r} of "
            "shape (rows, tokens), as from a Transformer, or the inputs of a StaticEmbedding."
        )
    return rows, form, {key: value for key, value in given.items() if key not in rows}


def to_features(rows: Mapping[str, Tensor], form: list[Any]) -> dict[str, Any]:
    """Return rows (texts, tokens) in their form again, without columns that no text needs."""
    name, start, *lacks = form
    mask = rows[MASK].bool()
    sizes = mask.sum(1)
    if name == "flat":
        return {TOKENS: rows[TOKENS][mask], _OFFSETS: sizes.cumsum(0) - sizes}
    if name == "packed":
        return _packed(rows[TOKENS][mask], sizes, start, lacks)
    width = int(mask.any(0).nonzero().max()) + 1 if mask.any() else 1
    features = {key: value[:, :width] for key, value in rows.items() if key not in lacks}
    return {**features, _COUNTS: sizes} if name == "counted" else features


def _padded(tokens: Tensor, sizes: Tensor) -> dict[str, Tensor]:
    live = torch.arange(int(sizes.max()), device=sizes.device) < sizes[:, None]
    rows = tokens.new_zeros(live.shape)
    rows[live] = tokens
    return {TOKENS: rows, MASK: live}


def _packed(tokens: Tensor, sizes: Tensor, start: int, lacks: list[str]) -> dict[str, Any]:
    """Return texts as transformers' DataCollatorWithFlattening packs them."""
    count = len(sizes)
    ends = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
    text = torch.repeat_interleave(torch.arange(count, device=sizes.device), sizes)
    place = torch.arange(len(tokens), device=sizes.device) - ends[text]
    longest = int(sizes.max())
    features: dict[str, Any] = {
        **dict.fromkeys(_ENDS, ends.int()),
        **dict.fromkeys(_LONGEST, longest),
        _POSITIONS: (place + start)[None],
        _TEXT: text.int()[None],
    }
    kept = {key: value for key, value in features.items() if key not in lacks}
    return {TOKENS: tokens[None], **kept}
