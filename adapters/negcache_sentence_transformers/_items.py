"""Rows that hold an item's number: the item itself is fetched when the row is drawn."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from negcache_torch import (
    DTypeError,
    FieldSpec,
    KeysError,
    KindError,
    NegativeCache,
    OptionError,
    ShapeError,
)
from sentence_transformers.util import batch_to_device
from torch import Tensor, nn

from ._columns import count_of, unlike
from ._contents import TEXT
from ._facts import FACTS, decode, encode, parse
from ._forms import MADE_WITH, TOKENS
from ._slots import slot_length
from ._tokens import ID, TokenRows
from ._wrappers import bare, refuse_shards

NUMBER = "number"
_TASK, _PROMPT, _LENGTH = "task", "prompt", "max_length"
_WORDS = 24  # int64 numbers of what a row remembers
_SHORTER = "give shorter prompts"
_ADVICE = (
    "features='index' needs for each row the number of its positive in items, shape (B,), or "
    "with H columns of negatives the numbers of positive and negatives, (B, 1 + H): in the "
    "data's column 'label', or in your own training loop as loss(features, labels)."
)


class ItemRows:
    """How items become rows: through their number in a sequence.

    items:      number -> what the model's preprocess takes: a text, an image, a dict of audio, …
    prompt, max_length: those of the items' columns, or one per task; None: what a trainer's
                columns say
    check:      whether each step compares one row of each column with the item of its number

    With its number, a row remembers how its column was made: task, prompt and max_length. A drawn
    row's features are made the same way.
    """

    def __init__(self, model: Any, items: Any, prompt: Any, length: Any, *, check: bool) -> None:
        self.model, self.items, self.check, self.step = model, _checked_items(items), check, 0
        self.prompt, self.length = _checked_prompt(prompt), length
        if length is not None:
            slot_length(model, length, 0)  # raises if it is not a length
        self.texts = TokenRows.unasked_length(model)

    def specs(self) -> dict[str, FieldSpec]:
        """Return the fields to store."""
        number = FieldSpec((), torch.int64)
        facts = FieldSpec((_WORDS,), torch.int64)
        return {NUMBER: number, FACTS: facts, TEXT: number, ID: number}

    def pack(
        self,
        columns: Sequence[Mapping[str, Any]],
        labels: Any,
        cache: NegativeCache,
        *,
        learning: bool,
    ) -> dict[str, Tensor]:
        """Return rows to store, column by column; raise before anything is changed.

        labels: numbers (B,) or (B, 1 + H); in evaluation also None, for items without numbers
        """
        held = int(cache.data[NUMBER].max())
        if held >= len(self.items):
            raise OptionError(
                f"the cache has item {held}, but items has {len(self.items)}: expected the items "
                "that the cache was filled with. Empty it with loss.handler.reset(), or pass "
                "all of them."
            )
        count = count_of(columns[0])
        device = _device_of(columns[0])
        if labels is None and not learning:  # each is a new item, unlike any with a number
            rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
            numbers = -1 - rank * 2**32 - torch.arange(count * len(columns), device=device)
        else:
            by_row = self._numbers(labels, count, len(columns))
            numbers = by_row.T.flatten().to(device, torch.int64)
        made = [self._made(column) for column in columns]
        words = [encode([], each, _WORDS, _SHORTER).to(device).expand(count, -1) for each in made]
        of_column = numbers.unflatten(0, (len(columns), count))
        texts = [self.contents(each, own) for each, own in zip(columns, of_column, strict=True)]
        if labels is not None and self.check:
            self._compare(columns, of_column.tolist(), made)
        return {NUMBER: numbers, FACTS: torch.cat(words), TEXT: torch.cat(texts), ID: numbers}

    def contents(self, column: Mapping[str, Any], numbers: Tensor) -> Tensor:
        """Return ids of the items' content, (n,): of their tokens, or else their numbers."""
        try:
            return self.texts.contents(column) if TOKENS in column else numbers
        except KindError:  # there is more than tokens
            return numbers

    def anchors(self, column: Mapping[str, Any], rows: Mapping[str, Tensor]) -> Tensor:
        """Return ids of the anchors' content, (B,): of their tokens, or else of all their values.

        rows: those of the items; anchors without values by row are identified by their positives'
              numbers
        """
        try:
            return self.texts.contents(column)
        except KindError:
            return rows[NUMBER][: count_of(column)]

    def unstored(self, column: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return rows of anchors, which no cache stores; the column has the features to embed."""
        none = torch.zeros(count_of(column), dtype=torch.int64, device=_device_of(column))
        return {TEXT: self.contents(column, none)}

    def told(self) -> dict[str, Any]:
        """Return what the model card says about how rows are kept."""
        return {"features": "index", "items": len(self.items)}

    def kinds(self, words: Tensor) -> list[tuple[dict[str, Any], Tensor]]:
        """Return how rows were made, by their facts, and which rows were made so."""
        distinct, which = words.unique(dim=0, return_inverse=True)
        return [
            (parse(kind)[1], (which == place).nonzero()[:, 0])
            for place, kind in enumerate(decode(distinct))
        ]

    def fetch(
        self, numbers: Iterable[int], made: Mapping[str, Any], device: torch.device
    ) -> dict[str, Any]:
        """Return the model's features of items, as the trainer's collator would make them."""
        options = {_TASK: None, _PROMPT: None, **made}
        found = self.model.preprocess([self.items[number] for number in numbers], **options)
        told = {_TASK: made[_TASK]} if _TASK in made else {}
        return batch_to_device({**found, **told}, device)

    def _made(self, column: Mapping[str, Any]) -> dict[str, Any]:
        """Return how a column was made: as it records, or by these options."""
        task = column.get(_TASK)
        if task is not None and not isinstance(task, str):
            raise KindError(f"a column's task is {task!r}: expected one name for all rows.")
        own = {_PROMPT: self.prompt, _LENGTH: self.length}
        own = {key: _of_task(value, task) for key, value in own.items() if value is not None}
        if MADE_WITH not in column:
            return {key: v for key, v in {**own, _TASK: task}.items() if v is not None}
        made: dict[str, Any] = json.loads(column[MADE_WITH])
        for key, value in own.items():
            if value != made.get(key):
                raise OptionError(
                    f"the loss has {key}={value!r} for items, but the trainer made a column of "
                    f"them with {made.get(key)!r}: leave it out of the loss."
                )
        return made

    def _numbers(self, labels: Any, count: int, columns: int) -> Tensor:
        """Return numbers (B, 1 + H)."""
        if labels is None:
            raise KeysError(f"the batch has no numbers: {_ADVICE}")
        if not isinstance(labels, Tensor):
            raise KindError(f"labels is a {type(labels).__name__}: expected a tensor. {_ADVICE}")
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise DTypeError(f"labels is {labels.dtype}: expected integers. {_ADVICE}")
        shapes = [(count, columns), *([(count,)] if columns == 1 else [])]
        if tuple(labels.shape) not in shapes:
            raise ShapeError(
                f"labels has shape {tuple(labels.shape)}, but the batch has {count} rows and "
                f"{columns - 1} columns of negatives: {_ADVICE}"
            )
        outside = (labels < 0) | (labels >= len(self.items))
        if outside.any():
            raise OptionError(
                f"labels has the number {int(labels[outside][0])}, but items has "
                f"{len(self.items)}: expected 0 to {len(self.items) - 1}."
            )
        return labels.reshape(count, columns)

    def _compare(
        self, columns: Sequence[Mapping[str, Any]], numbers: list[list[int]], made: list[Any]
    ) -> None:
        """Raise OptionError if a row is not its number's item; checks another row each step."""
        row = self.step % len(numbers[0])
        for place, (column, own, how) in enumerate(zip(columns, numbers, made, strict=True), 2):
            wrong = unlike(self.fetch([own[row]], how, _device_of(column)), column, row)
            if wrong is not None:
                raise OptionError(
                    f"row {row} of the batch's column {place} should be item {own[row]}, but its "
                    f"{wrong!r} differ from what the model makes of that item: do the numbers "
                    "refer to items, and do prompt and max_length match the columns? If "
                    "features differ from one call to the next, pass check_items=False."
                )
        self.step += 1


def rows_of(
    features: Any, model: Any, items: Any, prompt: Any, max_length: Any, *, check: bool
) -> TokenRows | ItemRows:
    """Return how a loss keeps rows. Raises OptionError or KindError for options that clash."""
    if features == "index":
        return ItemRows(model, items, prompt, max_length, check=check)
    if features != "content":
        raise OptionError(f"features is {features!r}: expected 'content' or 'index'.")
    named = [key for key, value in (("items", items), ("prompt", prompt)) if value is not None]
    if named:
        raise OptionError(
            f"the loss has {named}, which only features='index' uses, but features is 'content', "
            "which stores what is in the batches."
        )
    return TokenRows.of(model, max_length)


class Telling:
    """The `preprocess` of a model, which also records how it was called."""

    def __init__(self, preprocess: Callable[..., Mapping[str, Any]]) -> None:
        self.preprocess = preprocess

    def __call__(self, inputs: Sequence[Any], **options: Any) -> dict[str, Any]:
        """Return features as the model makes them, with a record of how."""
        made = {key: options.get(key) for key in (_TASK, _PROMPT, _LENGTH)}
        told = json.dumps({key: value for key, value in made.items() if value is not None})
        return {**self.preprocess(inputs, **options), MADE_WITH: told}


def packed(
    rows: TokenRows | ItemRows,
    columns: Sequence[Mapping[str, Any]],
    labels: Any,
    model: nn.Module,
    cache: NegativeCache,
    *,
    learning: bool,
) -> dict[str, Tensor]:
    """Return rows to store from a batch's columns; raise OptionError for unusable numbers.

    model: with its wrappers
    """
    if isinstance(rows, ItemRows):
        refuse_shards(model)
        rows.model = bare(model)  # a trainer may have made a new model
        return rows.pack(columns, labels, cache, learning=learning)
    return rows.pack(columns)


def numbers_in(rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the numbers of rows that have them, by key."""
    return {NUMBER: rows[NUMBER]} if NUMBER in rows else {}


def _checked_items(items: Any) -> Any:
    known = hasattr(items, "__getitem__") and hasattr(items, "__len__")
    if not known or isinstance(items, str | bytes | Mapping):
        raise KindError(
            f"items is a {type(items).__name__}: expected a sequence, such as a list or a column "
            "of a Dataset, that has an input of the model's preprocess at each number."
        )
    if not len(items):
        raise OptionError("items is empty: expected at least one item.")
    return items


def _checked_prompt(prompt: Any) -> Any:
    every = prompt.values() if isinstance(prompt, Mapping) else [prompt]
    if not all(each is None or isinstance(each, str) for each in every):
        raise KindError(f"prompt is {prompt!r}: expected a text, or a dict with one text per task.")
    return prompt


def _device_of(column: Mapping[str, Any]) -> torch.device:
    return next(each for each in column.values() if isinstance(each, Tensor)).device


def _of_task(given: Any, task: str | None) -> Any:
    return given.get(task) if isinstance(given, Mapping) else given
