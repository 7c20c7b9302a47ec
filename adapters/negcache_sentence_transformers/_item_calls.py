"""Which calls of the model embed items by number: a batch's columns, and drawn items."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._calls import Embed, Embedder, Last, in_parts
from ._columns import count_of, some_of
from ._contents import NO_TEXT, TEXT
from ._facts import FACTS
from ._items import NUMBER, ItemRows
from ._wrappers import parallel


class _Call(NamedTuple):
    """Features of `rows` rows; the `taken` ones are embedded, for the (m,) rows at `places`.

    which: (m,) the index of each one's embedding; None: in order
    """

    features: Mapping[str, Any]
    rows: int
    taken: Tensor
    places: Tensor
    which: Tensor | None = None


class ItemCalls(NamedTuple):
    """How a batch's columns and drawn items are embedded.

    rows:    what numbers refer to
    size:    the most rows of a call; None: all
    columns: the features of a batch's columns; their rows come first, then drawn ones
    """

    rows: ItemRows
    size: int | None
    columns: Sequence[Mapping[str, Any]]

    @property
    def joint(self) -> bool:
        """Whether each process makes calls for the kinds of all processes: not needed here."""
        return False

    def of_anchors(self, anchors: Mapping[str, Any]) -> "ItemCalls":
        """Return how a batch's anchors are embedded."""
        return self._replace(columns=[anchors])

    def embed(self, embed: Embed, rows: Mapping[str, Tensor], last: Last | None = None) -> Tensor:
        """Do what `RowCalls` says."""
        calls = self._calls(rows)
        parts: list[Tensor] = []
        found: list[Tensor] = []
        for number, call in enumerate(calls, 1):

            def features(index: dict[str, Tensor], call: _Call = call) -> dict[str, Any]:
                return some_of(call.features, call.rows, index["row"])

            final = last if number == len(calls) else None
            own = in_parts(embed, features, {"row": call.taken}, self.size, final, parts)
            parts += own
            embedded = torch.cat(own) if len(own) > 1 else own[0]
            found.append(embedded if call.which is None else embedded[call.which])
        every, places = torch.cat(found), torch.cat([call.places for call in calls])
        return every.new_zeros((len(rows[TEXT]), every.shape[1])).index_copy(0, places, every)

    def _calls(self, rows: Mapping[str, Tensor]) -> list[_Call]:
        calls, start, texts = [], 0, rows[TEXT]
        for column in self.columns:
            count = count_of(column)
            (live,) = torch.nonzero(texts[start : start + count] != NO_TEXT, as_tuple=True)
            if not len(live):  # a model needs at least one text
                live = torch.arange(count, device=texts.device)
            calls.append(_Call(column, count, live, start + live))
            start += count
        if start == len(texts):
            return calls
        for made, index in self.rows.kinds(rows[FACTS][start:]):
            places = start + index
            places = places[texts[places] != NO_TEXT]
            numbers, which = rows[NUMBER][places].unique(return_inverse=True)
            if len(numbers):
                features = self.rows.fetch(numbers.tolist(), made, texts.device)
                taken = torch.arange(len(numbers), device=texts.device)
                calls.append(_Call(features, len(numbers), taken, places, which))
        return calls


def embedder_of(
    model: nn.Module, rows: ItemRows, size: int | None, columns: Sequence[Mapping[str, Any]]
) -> Embedder:
    """Return the embedder of a batch's columns and drawn items.

    Each kind of items may go through its own weights, as images and texts do in CLIP.
    """
    wrapped = parallel(model)
    behind = wrapped is not None and wrapped.find_unused_parameters
    return Embedder(model, wrapped, ItemCalls(rows, size, columns), behind)
