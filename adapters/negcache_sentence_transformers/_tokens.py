"""Texts as rows of one length, which a cache can store, and back to a model's features."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from negcache_torch import FieldSpec, KeysError, KindError, ShapeError
from torch import Tensor
from torch.nn import functional

from ._contents import NOTHING_AROUND, TEXT, Around, ids_of_others, text_ids
from ._facts import (
    FACTS,
    WORDS,
    decode,
    encode,
    parse,
    prompt_lengths,
    signature,
    split,
    without_prompt,
)
from ._forms import MASK, TOKENS, to_features, to_rows
from ._slots import slot_length

ID = "id"
_SMALL = {MASK, "token_type_ids"}  # a byte is enough
_TEXT = "a text of 12 words, by which the tokenizers of routes are told apart"
_USUAL = (TOKENS, MASK, "token_type_ids")


class TokenRows(NamedTuple):
    """How a model's features become rows of `length` tokens.

    length: T, tokens in a row; shorter texts end in zeros
    dtypes: field -> the dtype that the model takes, each (rows, tokens)
    around: task -> the tokens before and after each text
    model:  the SentenceTransformer

    Tokens are stored as int32, and masks and types as int8. Each row also stores whatever else
    decides its embedding: the length of its prompt, its task, and the form in which the model takes
    it. So a row never depends on the batch that draws it.
    """

    length: int
    dtypes: dict[str, torch.dtype]
    around: dict[str | None, Around]
    model: Any

    @classmethod
    def of(cls, model: Any, max_length: int | Mapping[str, int] | None) -> "TokenRows":
        """Ask the model for its features of a text, on each of its routes that answers.

        Raises OptionError if no length is known, and KindError for a model without tokens.
        """
        dtypes, around, refused = _asked(model)
        if not dtypes and refused is not None:
            raise refused
        if not dtypes:
            dtypes = dict.fromkeys(_USUAL, torch.int64)
        token_bytes = sum(_stored(key, dtype).itemsize for key, dtype in dtypes.items())
        return cls(slot_length(model, max_length, token_bytes), dtypes, around, model)

    @classmethod
    def unasked_length(cls, model: Any) -> "TokenRows":
        """Return rows that are not stored, for a model that may take something other than texts."""
        dtypes, around, _ = _asked(model)
        return cls(0, dtypes, around, model)

    def specs(self) -> dict[str, FieldSpec]:
        """Return the fields to store: the tokens, what goes with them, and the text's ids."""
        stored = {
            key: FieldSpec((self.length,), _stored(key, dtype))
            for key, dtype in self.dtypes.items()
        }
        number = FieldSpec((), torch.int64)
        return {**stored, FACTS: FieldSpec((WORDS,), torch.int64), TEXT: number, ID: number}

    def pack(self, columns: Iterable[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return rows to store, column by column.

        `id` identifies a row's item: equal tokens, prompts and tasks. `text` identifies its
        content, whatever its prompt; NO_TEXT if it has none.

        Raises KindError, KeysError, ShapeError or OptionError for what a row cannot store.
        """
        parts = [self._column(column, self.length) for column in columns]
        return {key: torch.cat([part[key] for part in parts]) for key in self.specs()}

    def unstored(self, column: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return rows of a column that no cache stores, such as anchors, at their own length.

        Raises KindError, KeysError or OptionError for what a row cannot hold.
        """
        return self._column(column, None)

    def contents(self, column: Mapping[str, Any]) -> Tensor:
        """Return int64 (n,), the `text` of a column's rows, or what else identifies them.

        Raises KindError for rows that cannot be identified.
        """
        if TOKENS not in column:
            return ids_of_others(column)
        rows, _, given = to_rows(column)
        lengths = prompt_lengths(given, len(rows[TOKENS]), rows[TOKENS].device)
        return self._contents(rows, given, lengths)

    def anchors(self, column: Mapping[str, Any], _: Mapping[str, Tensor]) -> Tensor:
        """Return int64 (n,) that identify anchors."""
        return self.contents(column)

    def told(self) -> dict[str, Any]:
        """Return what the model card says about how rows are kept."""
        return {"features": "content"}

    def kinds(self, words: Tensor) -> dict[str, Tensor | None]:
        """Return the rows of each kind, by their facts; None if all are of one kind.

        A kind is one form, one task and, if the model leaves prompts out, one prompt length.
        """
        if (words == words[:1]).all():  # the usual case: no need to sort
            return {self._named(words[:1])[0]: None}
        keys, which = text_ids(words, torch.ones_like(words)).unique(return_inverse=True)
        of_each = torch.empty_like(keys).scatter_(0, which, torch.arange(len(which)).to(which))
        kinds = self._named(words[of_each])
        if len(set(kinds)) == 1:
            return {kinds[0]: None}
        numbers = {kind: number for number, kind in enumerate(dict.fromkeys(kinds))}
        of = torch.tensor([numbers[kind] for kind in kinds], device=which.device)[which]
        return {kind: (of == number).nonzero()[:, 0] for kind, number in numbers.items()}

    def features(self, rows: Mapping[str, Tensor], kind: str) -> dict[str, Any]:
        """Return the model's features for rows of one kind."""
        form, facts = parse(kind)
        features = to_features({key: rows[key] for key in self.dtypes}, form)
        dtypes = self.dtypes.items()
        return {**facts, **features, **{k: features[k].to(d) for k, d in dtypes if k in features}}

    def _named(self, words: Tensor) -> list[str]:
        kinds = decode(words)
        return (
            kinds if _leaves_prompts_out(self.model) else [without_prompt(kind) for kind in kinds]
        )

    def _column(self, column: Mapping[str, Any], length: int | None) -> dict[str, Tensor]:
        """Return the rows of a column, each (texts, …); tokens (texts, length)."""
        rows, form, given = to_rows(column)
        unknown = sorted(rows.keys() - self.dtypes.keys())
        if unknown:
            raise KeysError(
                f"a column has {unknown}, but the cache was made for {sorted(self.dtypes)}, "
                "which the model returned for a text when the loss was made. Make a new loss."
            )
        tokens, live = rows[TOKENS], rows[MASK].bool()
        count, width = tokens.shape
        length = width if length is None else length
        if width > length:
            raise ShapeError(
                f"a text has {width} tokens, but the cache stores {length}: make the loss with a "
                "larger max_length, or lower the model's max_seq_length."
            )
        if form[0] in {"padded", "counted"}:
            form += sorted(self.dtypes.keys() - rows.keys())
        distinct, which = split(given, count, tokens.device)
        facts = torch.stack([encode(form, each) for each in distinct]).to(tokens.device)
        signs = torch.tensor([signature(each) for each in distinct], device=tokens.device)
        lengths = prompt_lengths(given, count, tokens.device)
        packed = {
            key: functional.pad(rows[key].to(_stored(key, dtype)), (0, length - width))
            if key in rows
            else tokens.new_zeros((count, length), dtype=_stored(key, dtype))
            for key, dtype in self.dtypes.items()
        }
        return {
            **packed,
            FACTS: facts[which],
            TEXT: self._contents(rows, given, lengths),
            ID: text_ids(tokens, live) ^ signs[which],
        }

    def _contents(
        self, rows: Mapping[str, Tensor], given: Mapping[str, Any], prompts: Tensor
    ) -> Tensor:
        around = self.around.get(given.get("task"), self.around.get(None, NOTHING_AROUND))
        return around.contents(rows[TOKENS], rows[MASK].bool(), prompts)


def _asked(
    model: Any,
) -> tuple[dict[str, torch.dtype], dict[str | None, Around], KindError | None]:
    """Return the model's features of a text, what it puts around one, and the error of a misfit.

    For each of its routes that answers.
    """
    dtypes: dict[str, torch.dtype] = {}
    around: dict[str | None, Around] = {}
    refused = None
    for task in _tasks(model):
        try:
            rows, text = _sample(model, _TEXT, task)
            dtypes |= {key: value.dtype for key, value in rows.items()}
            around[task] = Around.of(_sample(model, "", task)[1], text)
        except KindError as error:
            refused = error
        except Exception:  # noqa: BLE001, S110  # a route for images, or none: a batch will tell
            pass
    return dtypes, around, refused


def _tasks(model: Any) -> list[str | None]:
    """Return the tasks that a model may know: none, its routes, and the usual ones."""
    mapped = [task for task, _ in getattr(model[0], "route_mappings", {})]
    routes = getattr(model[0], "sub_modules", {})
    return list(dict.fromkeys((None, *routes, *mapped, "query", "document")))


def _sample(model: Any, text: str, task: str | None) -> tuple[dict[str, Tensor], Tensor]:
    """Return the rows of one text, and its tokens."""
    options = {} if task is None else {"task": task}
    rows, _, _ = to_rows(model.preprocess([text], **options))
    return rows, rows[TOKENS][rows[MASK].bool()]


def _leaves_prompts_out(model: Any) -> bool:
    """Return whether a module may leave prompts out: a pooling that does, or a user's module."""
    return any(
        not getattr(each, "include_prompt", True)
        or not type(each).__module__.startswith("sentence_transformers.")
        for each in _parts(model)
    )


def _parts(modules: Iterable[Any]) -> Iterator[Any]:
    """Yield modules, with the modules of a router's routes in place of the router."""
    for each in modules:
        if hasattr(each, "sub_modules"):
            for route in each.sub_modules.values():
                yield from _parts(route)
        else:
            yield each


def _stored(key: str, dtype: torch.dtype) -> torch.dtype:
    if key in _SMALL or dtype == torch.bool:
        return torch.int8
    return dtype if dtype.is_floating_point else torch.int32
