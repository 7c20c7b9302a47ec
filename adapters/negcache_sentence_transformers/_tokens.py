"""Texts as rows of one length, which a cache can store, and back as what a model takes."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from negcache_torch import FieldSpec, KeysError, KindError, OptionError, ShapeError
from torch import Tensor
from torch.nn import functional

TOKENS, MASK, OFFSETS, ID = "input_ids", "attention_mask", "offsets", "id"
_RESULTS = {"sentence_embedding", "token_embeddings", "all_layer_embeddings"}  # of a pass before
_BATCH_FACTS = {"prompt_length"}  # a tensor, perhaps, that is about a batch and not about its rows
_GAMMA = 0x9E3779B97F4A7C15 - 2**64  # odd 64-bit constants, as int64
_MIX = 0xBF58476D1CE4E5B9 - 2**64


class TokenRows(NamedTuple):
    """How a model's features become rows of `length` tokens.

    length: T, tokens of a row; shorter texts end in zeros
    dtypes: field -> what the model takes, each (rows, tokens)
    flat:   whether the model takes all texts' tokens in one row, and where each begins

    Tokens are stored as int32 and the masks and types beside them as int8: a quarter of int64.
    """

    length: int
    dtypes: dict[str, torch.dtype]
    flat: bool

    @classmethod
    def of(cls, model: Any, max_length: int | None) -> "TokenRows":
        """Ask the model what it makes of a text."""
        length = model.max_seq_length if max_length is None else max_length
        if not isinstance(length, int) or length < 1:
            raise OptionError(
                f"the model's max_seq_length is {length}, and a cache stores rows of one length: "
                "give max_length, the most tokens that a text may have."
            )
        sample = model.preprocess(["text"])
        flat = OFFSETS in sample
        rows, _ = _as_rows(sample)
        return cls(length, {key: value.dtype for key, value in rows.items()}, flat)

    def specs(self) -> dict[str, FieldSpec]:
        """Return the fields to store: the tokens, what goes with them, and the text's id."""
        stored = {key: FieldSpec((self.length,), _stored(key)) for key in self.dtypes}
        return {**stored, ID: FieldSpec((), torch.int64)}

    def pack(
        self, columns: Iterable[Mapping[str, Any]]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return rows to store, column by column, and what is not by row, equal in all columns."""
        parts, facts = [], []
        for column in columns:
            rows, fact = _as_rows(column)
            parts.append({key: self._padded(key, rows.get(key)) for key in self.dtypes})
            facts.append(fact)
        if any(not _equal(fact, facts[0]) for fact in facts):
            raise OptionError(
                f"positives and negatives were made differently, {facts}: give their columns the "
                "same prompt and task."
            )
        packed = {key: torch.cat([part[key] for part in parts]) for key in self.dtypes}
        return {**packed, ID: text_ids(packed[TOKENS], packed[MASK])}, facts[0]

    def unpack(self, rows: Mapping[str, Tensor], facts: Mapping[str, Any]) -> dict[str, Any]:
        """Return the model's features, without the zeros that no row needs."""
        mask = rows[MASK].bool()
        if self.flat:
            sizes = mask.sum(1)
            tokens = rows[TOKENS][mask].to(self.dtypes[TOKENS])
            return {**facts, TOKENS: tokens, OFFSETS: sizes.cumsum(0) - sizes}
        width = int(mask.any(0).nonzero().max()) + 1 if mask.any() else 1
        return {
            **facts,
            **{key: rows[key][:, :width].to(dtype) for key, dtype in self.dtypes.items()},
        }

    def _padded(self, key: str, rows: Tensor | None) -> Tensor:
        if rows is None:
            raise KeysError(f"a column has no {key!r}: the loss was made when the model gave one.")
        if rows.shape[1] > self.length:
            raise ShapeError(
                f"a text has {rows.shape[1]} tokens and the cache stores {self.length}: make the "
                "loss with a larger max_length, or lower the model's max_seq_length."
            )
        return functional.pad(rows.to(_stored(key)), (0, self.length - rows.shape[1]))


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


def _as_rows(features: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return features that are (rows, tokens), and all others; refuse a model without tokens."""
    given = {key: value for key, value in features.items() if key not in _RESULTS}
    if OFFSETS in given:
        tokens, starts = given.pop(TOKENS), given.pop(OFFSETS)
        ends = torch.cat([starts[1:], starts.new_tensor([len(tokens)])])
        sizes = ends - starts
        live = torch.arange(int(sizes.max()), device=sizes.device) < sizes[:, None]
        rows = tokens.new_zeros(live.shape)
        rows[live] = tokens
        given |= {TOKENS: rows, MASK: live}
    shape = getattr(given.get(TOKENS), "shape", None)
    by_row = {
        key: value
        for key, value in given.items()
        if isinstance(value, Tensor) and key not in _BATCH_FACTS
    }
    if MASK not in by_row or any(value.shape != shape for value in by_row.values()):
        raise KindError(
            f"the model makes {sorted(given)} of a text: expected {TOKENS!r} and {MASK!r} of shape "
            "(rows, tokens), as a Transformer makes them, or those of a StaticEmbedding."
        )
    return by_row, {key: value for key, value in given.items() if key not in by_row}


def _stored(key: str) -> torch.dtype:
    return torch.int32 if key == TOKENS else torch.int8


def _equal(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(torch.as_tensor(value), torch.as_tensor(other[key]))
        if isinstance(value, Tensor | int)
        else value == other[key]
        for key, value in one.items()
    )
