"""Texts as rows of one length, which a cache can store, and back as what a model takes."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from negcache_torch import FieldSpec, KeysError, KindError, ShapeError
from torch import Tensor
from torch.nn import functional

from ._facts import FACTS, PROMPT, WORDS, decode, encode, parse, signature, split, without_prompt
from ._forms import MASK, TOKENS, to_features, to_rows
from ._slots import slot_length

ID = "id"
_EMPTY_ID = 0
_SMALL = {MASK, "token_type_ids"}  # a byte is enough
_USUAL = (TOKENS, MASK, "token_type_ids")
_GAMMA = 0x9E3779B97F4A7C15 - 2**64  # odd 64-bit constants, as int64
_MIX = 0xBF58476D1CE4E5B9 - 2**64


class TokenRows(NamedTuple):
    """How a model's features become rows of `length` tokens.

    length: T, tokens of a row; shorter texts end in zeros
    dtypes: field -> what the model takes, each (rows, tokens)
    blank:  task -> what the model makes of an empty text, (tokens,)
    model:  the SentenceTransformer

    Tokens are stored as int32 and the masks and types beside them as int8: a quarter of int64. With
    each row is stored what decides its embedding beside its tokens: the length of its prompt, its
    task, the form in which the model takes it. So a row never depends on the batch that draws it.
    """

    length: int
    dtypes: dict[str, torch.dtype]
    blank: dict[str | None, Tensor]
    model: Any

    @classmethod
    def of(cls, model: Any, max_length: int | Mapping[str, int] | None) -> "TokenRows":
        """Ask the model what it makes of a text, on each of its routes that answers.

        Raises OptionError where no length is known, and KindError for a model without tokens.
        """
        dtypes: dict[str, torch.dtype] = {}
        blank: dict[str | None, Tensor] = {}
        refused = None
        for task in _tasks(model):
            try:
                rows, _ = _sample(model, "text", task)
                dtypes |= {key: value.dtype for key, value in rows.items()}
                _, blank[task] = _sample(model, "", task)
            except KindError as error:
                refused = error
            except Exception:  # noqa: BLE001, S110  # a route for images, or none: a batch will tell
                pass
        if not dtypes and refused is not None:
            raise refused
        if not dtypes:
            dtypes = dict.fromkeys(_USUAL, torch.int64)
        token_bytes = sum(_stored(key, dtype).itemsize for key, dtype in dtypes.items())
        return cls(slot_length(model, max_length, token_bytes), dtypes, blank, model)

    def specs(self) -> dict[str, FieldSpec]:
        """Return the fields to store: the tokens, what goes with them, and the text's id."""
        stored = {
            key: FieldSpec((self.length,), _stored(key, dtype))
            for key, dtype in self.dtypes.items()
        }
        return {**stored, FACTS: FieldSpec((WORDS,), torch.int64), ID: FieldSpec((), torch.int64)}

    def pack(self, columns: Iterable[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return rows to store, column by column.

        Raises KindError, KeysError, ShapeError or OptionError for what a row cannot store.
        """
        parts = [self._column(column) for column in columns]
        return {key: torch.cat([part[key] for part in parts]) for key in self.specs()}

    def embed(
        self, embed: Callable[[dict[str, Any]], Tensor], rows: Mapping[str, Tensor]
    ) -> Tensor:
        """Return the embeddings (n, D) of rows: one call of the model for each kind of rows.

        embed: features -> embeddings

        Rows of one form, task and, where the model leaves prompts out, prompt length are of a kind.
        Of several processes each makes the calls of all, since their wrappers of the model wait for
        each other in every call.
        """
        kinds = self._kinds(rows[FACTS])
        calls = {
            kind: {key: rows[key] if index is None else rows[key][index] for key in self.dtypes}
            for kind, index in kinds.items()
        }
        calls = _calls_of_all(calls)
        if len(calls) == 1:
            ((kind, own),) = calls.items()
            return embed(self._features(own, kind))
        count, device = len(rows[FACTS]), rows[FACTS].device
        parts, where, start = [], torch.zeros(count, dtype=torch.int64, device=device), 0
        for kind, own in sorted(calls.items()):
            parts.append(embed(self._features(own, kind)))
            if kind in kinds:  # else another process's, and nobody's embedding
                where[kinds[kind]] = torch.arange(start, start + len(parts[-1]), device=device)
            start += len(parts[-1])
        return torch.cat(parts)[where]

    def empty(self, rows: Mapping[str, Tensor]) -> Tensor:
        """Return bool (n,): whether a row's text is empty, its prompt and special tokens aside."""
        return rows[ID] == _EMPTY_ID

    def _column(self, column: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the rows of a column, each (texts, …)."""
        rows, form, given = to_rows(column)
        unknown = sorted(rows.keys() - self.dtypes.keys())
        if unknown:
            raise KeysError(
                f"a column has {unknown}, and the cache was made for {sorted(self.dtypes)}: what "
                "the model gave for a text when the loss was made. Make the loss anew."
            )
        tokens, live = rows[TOKENS], rows[MASK].bool()
        count, width = tokens.shape
        if width > self.length:
            raise ShapeError(
                f"a text has {width} tokens and the cache stores {self.length}: make the loss with "
                "a larger max_length, or lower the model's max_seq_length."
            )
        if form[0] in {"padded", "counted"}:
            form += sorted(self.dtypes.keys() - rows.keys())
        distinct, which = split(given, count, tokens.device)
        facts = torch.stack([encode(form, each) for each in distinct]).to(tokens.device)
        signs = torch.tensor([signature(each) for each in distinct], device=tokens.device)
        prompts = torch.tensor([each.get(PROMPT) or 0 for each in distinct], device=tokens.device)
        ids = text_ids(tokens, live) ^ signs[which]
        blank = self.blank.get(given.get("task"), self.blank.get(None))
        empty = _empty(tokens, live, prompts[which], blank)
        packed = {
            key: functional.pad(rows[key].to(_stored(key, dtype)), (0, self.length - width))
            if key in rows
            else tokens.new_zeros((count, self.length), dtype=_stored(key, dtype))
            for key, dtype in self.dtypes.items()
        }
        return {**packed, FACTS: facts[which], ID: torch.where(empty, _EMPTY_ID, ids)}

    def _kinds(self, words: Tensor) -> dict[str, Tensor | None]:
        """Return the rows of each kind; None where all are of one."""
        keys, which = text_ids(words, torch.ones_like(words)).unique(return_inverse=True)
        of_each = torch.empty_like(keys).scatter_(0, which, torch.arange(len(which)).to(which))
        kinds = decode(words[of_each])
        if not _leaves_prompts_out(self.model):
            kinds = [without_prompt(kind) for kind in kinds]
        if len(set(kinds)) == 1:
            return {kinds[0]: None}
        numbers = {kind: number for number, kind in enumerate(dict.fromkeys(kinds))}
        of = torch.tensor([numbers[kind] for kind in kinds], device=which.device)[which]
        return {kind: (of == number).nonzero()[:, 0] for kind, number in numbers.items()}

    def _features(self, rows: Mapping[str, Tensor], kind: str) -> dict[str, Any]:
        """Return what the model takes for rows of one kind."""
        form, facts = parse(kind)
        features = to_features(rows, form)
        dtypes = self.dtypes.items()
        return {**facts, **features, **{k: features[k].to(d) for k, d in dtypes if k in features}}


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


def _empty(tokens: Tensor, live: Tensor, prompts: Tensor, blank: Tensor | None) -> Tensor:
    """Return bool (n,): what follows its prompt is the end of what an empty text is, or nothing.

    blank: (E,) the tokens of an empty text: special ones, such as [CLS] and [SEP]
    """
    sizes = live.sum(1) - prompts
    if blank is None or not len(blank):
        return sizes <= 0
    blank = blank.to(tokens)
    from_end = live.flip(1).cumsum(1).flip(1)  # 1 is a text's last token
    after = live & (from_end <= sizes[:, None])
    equal = tokens == blank[(len(blank) - from_end).clamp(0, len(blank) - 1)]
    return (sizes <= len(blank)) & (equal | ~after).all(1)


def _calls_of_all(own: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Return the calls of this process, and one row for each kind that only others have."""
    count = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if count == 1:
        return own
    examples: list[Any] = [None] * count
    dist.all_gather_object(
        examples,
        {kind: {key: v[:1].cpu() for key, v in rows.items()} for kind, rows in own.items()},
    )
    device = next(iter(next(iter(own.values())).values())).device
    others = {kind: rows for each in examples for kind, rows in each.items() if kind not in own}
    return own | {
        kind: {key: value.to(device) for key, value in rows.items()}
        for kind, rows in others.items()
    }


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
    """Return whether a module may leave prompts out: a pooling that does, or one of the user's."""
    return any(
        not getattr(each, "include_prompt", True)
        or not type(each).__module__.startswith("sentence_transformers.")
        for each in _parts(model)
    )


def _parts(modules: Iterable[Any]) -> Iterator[Any]:
    """Yield modules, those of a router's routes instead of the router."""
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
