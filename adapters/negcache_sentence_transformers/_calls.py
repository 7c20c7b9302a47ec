"""Which calls of the model embed rows: kinds, mini-batches, and what processes must share."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from negcache_torch import in_chunks
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from ._contents import NO_TEXT, TEXT
from ._facts import FACTS
from ._forms import MADE_WITH
from ._tokens import TokenRows
from ._wrappers import found_behind, parallel

Rows = dict[str, Tensor]
Embed = Callable[[dict[str, Any]], Tensor]  # features -> embeddings
Last = Callable[[dict[str, Any], list[Tensor]], Tensor]  # also gets those of the other calls


class Unstored(Protocol):
    """What the model takes for rows."""

    def unstored(self, column: Mapping[str, Any]) -> Rows:
        """Return a column of a batch as rows of the kind that a cache stores."""


class RowCalls(Protocol):
    """By which calls of the model rows are embedded."""

    @property
    def rows(self) -> Unstored:
        """What the model takes for rows."""

    @property
    def size(self) -> int | None:
        """The most rows of a call; None: all."""

    @property
    def joint(self) -> bool:
        """Whether each process makes calls for the kinds of all processes."""

    def of_anchors(self, anchors: Mapping[str, Any]) -> "RowCalls":
        """Return the calls for a batch's anchors."""

    def embed(self, embed: Embed, rows: Mapping[str, Tensor], last: Last | None = None) -> Tensor:
        """Return embeddings (n, D) of rows; zeros for texts without content.

        last: replaces the last call
        """


class Calls(NamedTuple):
    """How rows are embedded.

    rows:   what the model takes for rows
    size:   the most rows of a call; None: all
    joint:  whether each process makes calls for the kinds of all processes, so that all have
            gradients for the same weights
    evenly: whether each also makes as many calls as the others for each kind
    """

    rows: TokenRows
    size: int | None = None
    joint: bool = False
    evenly: bool = False

    def embed(self, embed: Embed, rows: Mapping[str, Tensor], last: Last | None = None) -> Tensor:
        """Do what `RowCalls` says."""
        taken = {key: rows[key] for key in (*self.rows.dtypes, FACTS)}
        (live,) = torch.nonzero(rows[TEXT] != NO_TEXT, as_tuple=True)
        count = len(rows[TEXT])
        if len(live) in {0, count}:  # a model needs at least one text
            return self._kind_by_kind(embed, taken, last)
        found = self._kind_by_kind(embed, _at(taken, live), last)
        return found.new_zeros((count, found.shape[1])).index_copy(0, live, found)

    def of_anchors(self, _: Mapping[str, Any]) -> "Calls":
        """Return how a batch's anchors are embedded: as their rows specify."""
        return self

    def _kind_by_kind(self, embed: Any, rows: Rows, last: Any) -> Tensor:
        kinds = self.rows.kinds(rows[FACTS])
        calls = {kind: rows if index is None else _at(rows, index) for kind, index in kinds.items()}
        if self.joint:
            calls = self._calls_of_all(calls)
        count, device = len(rows[FACTS]), rows[FACTS].device
        parts: list[Tensor] = []
        place, start = torch.zeros(count, dtype=torch.int64, device=device), 0
        for number, (kind, own) in enumerate(sorted(calls.items()), 1):
            final = last if number == len(calls) else None
            features = partial(self.rows.features, kind=kind)
            parts += in_parts(embed, features, own, self.size, final, parts)
            if kind in kinds:  # otherwise it belongs to another process, and no embedding is used
                index = kinds[kind]
                size = count if index is None else len(index)
                there = torch.arange(start, start + size, device=device)
                place[slice(None) if index is None else index] = there
            start += len(own[FACTS])
        if len(parts) == 1:
            return parts[0][:count]
        return torch.cat(parts)[place]

    def _calls_of_all(self, own: dict[str, Rows]) -> dict[str, Rows]:
        """Return this process's calls, and a row for each kind that only others have."""
        told: list[Any] = [None] * dist.get_world_size()
        examples = {
            kind: (len(rows[FACTS]), {key: value[:1].cpu() for key, value in rows.items()})
            for kind, rows in own.items()
        }
        dist.all_gather_object(told, examples)
        device = next(iter(own.values()))[FACTS].device
        calls = dict(own)
        for kind in {kind for each in told for kind in each}:
            (most, one) = max((each[kind] for each in told if kind in each), key=lambda it: it[0])
            if kind not in calls:
                calls[kind] = {key: value.to(device) for key, value in one.items()}
            if self.evenly and self.size is not None:
                rows, least = calls[kind], (most - 1) // self.size * self.size + 1
                spare = torch.arange(least, device=device).clamp(max=len(rows[FACTS]) - 1)
                calls[kind] = rows if len(rows[FACTS]) >= least else _at(rows, spare)
        return calls


def in_parts(
    embed: Embed,
    features: Callable[[Rows], dict[str, Any]],
    rows: Rows,
    size: int | None,
    last: Last | None,
    before: Sequence[Tensor],
) -> list[Tensor]:
    """Return the embeddings of rows of one kind, in one or more parts.

    features:    what the model takes for rows
    before:      embeddings of earlier calls; for the other arguments see `RowCalls` and `Calls`
    """

    def network(rows: Rows) -> Tensor:
        return embed(features(rows))

    chunked = network if size is None else in_chunks(network, size)
    if last is None:
        return [chunked(rows)]
    count = len(next(iter(rows.values())))
    cut = 0 if size is None else (count - 1) // size * size
    parts = [chunked({key: value[:cut] for key, value in rows.items()})] if cut else []
    final = features({key: value[cut:] for key, value in rows.items()})
    return [*parts, last(final, [*before, *parts])]


class Embedder(NamedTuple):
    """Embeds a step's texts with a model that the trainer may have wrapped.

    wrapped: the DistributedDataParallel around it, if any
    behind:  whether that must find the weights of all calls through the one call that it sees
    """

    model: nn.Module
    wrapped: DistributedDataParallel | None
    calls: RowCalls
    behind: bool

    @classmethod
    def of(
        cls, model: nn.Module, rows: TokenRows, size: int | None, *, sharded: bool, routes: bool
    ) -> "Embedder":
        """Choose which calls the processes must share.

        size:    texts of a call; None: all
        sharded: whether there are several processes
        routes:  whether some texts may go through other weights than others
        """
        wrapped = parallel(model)
        joint = sharded and (wrapped is None or routes)
        calls = Calls(rows, size, joint, evenly=joint and wrapped is None)
        behind = wrapped is not None and wrapped.find_unused_parameters and routes
        return cls(model, wrapped, calls, behind)

    def anchors(self, anchors: Mapping[str, Any]) -> Tensor:
        """Return embeddings (B, D) of a column's features."""
        if self.calls.size is None and not self.calls.joint:
            return embed(self.model, anchors)
        rows = self.calls.rows.unstored(anchors)
        return self.calls.of_anchors(anchors).embed(self._inside, rows)

    def items(self, rows: Mapping[str, Tensor], queries: Tensor) -> Tensor:
        """Return embeddings (n, D) of stored rows.

        Processes may make different numbers of calls, and each call of DistributedDataParallel
        waits for all of them. So each process calls it only once, last, which prepares the exchange
        of gradients, and makes its other calls to the wrapped model.
        """
        wrapped = self.wrapped
        if wrapped is None:
            return self.calls.embed(self._inside, rows)

        def last(features: dict[str, Any], others: list[Tensor]) -> Tensor:
            behind = found_behind(wrapped, [queries, *others]) if self.behind else nullcontext()
            with behind:
                return embed(self.model, features)

        return self.calls.embed(self._inside, rows, last)

    def _inside(self, features: Mapping[str, Any]) -> Tensor:
        return embed(self.model if self.wrapped is None else self.wrapped.module, features)


def embed(model: nn.Module, features: Mapping[str, Any]) -> Tensor:
    """Return normalised embeddings (n, D), at least as wide as float32."""
    given = {key: value for key, value in features.items() if key != MADE_WITH}
    rows = model(given)["sentence_embedding"]  # modules write into their input
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return functional.normalize(rows, dim=1)


def _at(rows: Mapping[str, Tensor], index: Tensor) -> Rows:
    return {key: value[index] for key, value in rows.items()}
