"""Further directions of the softmax: a pair's document is scored too, and anchors are negatives.

A pair has up to two views, its anchor's and its document's, each a query to the cache. In a joint
softmax each view gets the mass of the other as a constant, so that both have the same total.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from negcache_torch import CacheLossReturn, FieldSpec, KindError, OptionError, Retrieval
from torch import Tensor

from negcache_core.arrays.exclusion import Exclusions, Labels

from ._contents import NO_TEXT, TEXT
from ._known import NOTHING, RING, Ids, Known
from ._tokens import ID

KIND = "kind"  # the field that marks a row as a document or an anchor
DOCUMENT, ANCHOR = 0, 1
WANTED = {  # direction -> whose view it belongs to, and which kind competes
    "query_to_doc": (0, DOCUMENT),
    "query_to_query": (0, ANCHOR),
    "doc_to_query": (1, ANCHOR),
    "doc_to_doc": (1, DOCUMENT),
}
_SALT = 0x5851F42D4C957F2D  # makes an anchor a different item from a document with the same text


class Directions(NamedTuple):
    """Which views a pair has, and what competes in each.

    names: of WANTED
    joint: whether there is one softmax over all of them, or the mean of one per direction
    """

    names: tuple[str, ...] = ("query_to_doc",)
    joint: bool = True

    @classmethod
    def of(
        cls,
        names: Any,
        partition_mode: Any,
        *,
        correction: Any,
        cut: bool,
        by_number: bool,
        sharded: bool,
    ) -> "Directions":
        """Return the directions; raise KindError or OptionError if they make no loss.

        correction: the option staleness_correction; cut: whether embeddings are cut to several
        widths; by_number: whether items are known by number; sharded: whether there are several
        processes
        """
        if isinstance(names, str) or not isinstance(names, Iterable):
            raise KindError(
                f"directions is {names!r}: expected several names, such as ('query_to_doc',)."
            )
        names = tuple(names)
        unknown = [name for name in names if name not in WANTED]
        if unknown or "query_to_doc" not in names or len(names) > len(set(names)):
            raise OptionError(
                f"directions is {names!r}: expected 'query_to_doc', which has the positive, plus "
                f"any others of {list(WANTED)}, each once."
            )
        if partition_mode not in {"joint", "per_direction"}:
            raise OptionError(
                f"partition_mode is {partition_mode!r}: expected 'joint' or 'per_direction'."
            )
        found = cls(names, partition_mode == "joint")
        if not found.joint and {"query_to_query", "doc_to_doc"} & set(names):
            raise OptionError(
                "partition_mode='per_direction' is for 'query_to_doc' and 'doc_to_query': "
                "'query_to_query' and 'doc_to_doc' have no loss of their own, because the "
                "positive is not among their candidates. Use partition_mode='joint'."
            )
        if found.joint and found.views == 2 and correction:
            raise OptionError(
                "staleness_correction=True corrects each view separately, but directions "
                f"{names!r} share one softmax over both: leave it out."
            )
        if cut and not found.plain:
            raise OptionError(
                f"matryoshka_dims does not work with directions {names!r}: further directions "
                "score whole embeddings. Use directions=('query_to_doc',), or leave "
                "matryoshka_dims out."
            )
        if by_number and not found.plain:
            raise OptionError(
                f"features='index' does not work with directions {names!r}: further directions "
                "store anchors, which have no numbers. Use directions=('query_to_doc',), or "
                "features='content'."
            )
        if sharded and not found.plain:
            raise OptionError(
                f"directions is {names!r} in several processes, but negatives of further "
                "directions are not exchanged between processes: train in one process, or with "
                "directions=('query_to_doc',)."
            )
        return found

    @property
    def plain(self) -> bool:
        """Whether there is only the usual direction."""
        return len(self.names) == 1

    @property
    def views(self) -> int:
        """The number of queries per pair: 1, or 2 with its document."""
        return 1 + max(WANTED[name][0] for name in self.names)

    @property
    def anchors(self) -> bool:
        """Whether anchors are candidates, and so enter the cache."""
        return any(WANTED[name][1] == ANCHOR for name in self.names)

    @property
    def symmetric(self) -> bool:
        """Whether an anchor is a candidate of its own document: so its score counts twice."""
        return self.joint and "doc_to_query" in self.names

    def counts(self) -> list[list[bool]]:
        """Return by view whether documents and anchors compete in it."""
        there = [WANTED[name] for name in self.names]
        return [
            [(view, kind) in there for kind in (DOCUMENT, ANCHOR)] for view in range(self.views)
        ]

    def fields(self) -> dict[str, FieldSpec]:
        """Return what a row must store besides its text: its kind, if a view excludes one.

        If there are only documents, there is nothing to exclude.
        """
        mixed = self.anchors and not all(map(all, self.counts()))
        return {KIND: FieldSpec((), torch.int64)} if mixed else {}

    def keys(self, group_key: str | None) -> tuple[tuple[str, ...], str | None]:
        """Return the fields of `fields` that are ids, and the group key, perhaps one of them.

        If each view wants one kind, kinds are groups: that is faster than ids that half of the rows
        have. But there is only one group key.
        """
        apart = self.counts() == [[True, False], [False, True]]
        return ((), KIND) if apart and group_key is None else (tuple(self.fields()), group_key)

    def labels(self, rows: Mapping[str, Tensor], kind: int) -> dict[str, Tensor]:
        """Return `fields` of rows of a kind."""
        return {key: torch.full_like(rows[ID], kind) for key in self.fields()}


def reverse(anchors: Mapping[str, Tensor], texts: Tensor) -> Ids:
    """Return ids of a batch with roles swapped: anchors are items, of documents (B,).

    They are all salted, so that facts about anchors never mix with facts about documents.
    """
    return Ids(texts, anchors[ID], anchors[TEXT]).of_dataset(_SALT)


class Batch(NamedTuple):
    """B pairs with both sides known.

    queries:  (B, D), differentiable
    items:    (n, D), n = B (1 + H), documents, column by column, differentiable
    rows:     key -> (n, …), as stored; anchors: key -> (B, …)
    forward:  facts about documents; backward: about anchors, see `reverse`
    in_batch: whether more of the batch competes than each anchor's explicit negatives
    """

    queries: Tensor
    items: Tensor
    rows: dict[str, Tensor]
    anchors: dict[str, Tensor]
    forward: Known
    backward: Known
    in_batch: bool

    def loss(
        self,
        directions: Directions,
        handler: Any,
        embed: Callable[[dict[str, Tensor]], Tensor] | None,
    ) -> tuple[Tensor, CacheLossReturn]:
        """Return the mean loss, and the result by view and pair, for a handler to commit.

        embed: rows -> embeddings, for drawn rows; None: nothing is drawn
        """
        both = self._views(directions, self.queries, self.items)
        own = self._own(directions)
        found: Retrieval = handler.retrieve(
            both.detach(),
            self._positives(directions),
            positive_ids={key: own[key] for key in handler.cache_loss.id_keys},
            noise=None
            if embed
            else both.new_full((len(both), handler.cache_loss.num_samples, 2), 0.5),
        )
        drawn: Any = found.stale_embeddings
        if embed is not None:
            drawn = embed(found.features)
        with torch.autocast(both.device.type, enabled=False):
            scale = handler.cache_loss.scale
            scores = scale * both @ torch.cat([self.items, self.queries]).T
            positive = scale * (self.queries * self.items[: len(self.queries)]).sum(1)
        competing = torch.where(self._counts(directions, own), scores, -torch.inf)
        if directions.joint and directions.views > 1:
            cached: Any = found.log_partition
            rest = _mass_of_others(competing, cached, positive, directions.symmetric)
            competing = torch.cat([competing, rest[:, None]], 1)
        result = handler.compute_loss(
            both,
            self._views(directions, self.items, self.queries),
            drawn,
            found,
            competing_scores=competing,
            constant=("positives", "negatives"),  # of two sides, one of which may be frozen
        )
        return self._mean(_joined(directions, result, positive)), result

    def stored(self, directions: Directions) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the embeddings and the rows that enter the cache."""
        if not directions.anchors:
            return self.items, self.rows
        rows = {key: torch.cat([self.rows[key], self.anchors[key]]) for key in self.rows}
        return torch.cat([self.items, self.queries]), rows

    def _views(self, directions: Directions, first: Tensor, second: Tensor) -> Tensor:
        """Return (V B, …): the first B of each view's pairs."""
        count = len(self.queries)
        return torch.cat([first[:count], second[:count]][: directions.views])

    def _positives(self, directions: Directions) -> dict[str, Tensor]:
        rows, anchors = self.rows, self.anchors
        return {key: self._views(directions, rows[key], anchors[key]) for key in rows}

    def _own(self, directions: Directions) -> dict[str, Tensor]:
        """Return key -> (V B, P), ids of rows that are not negatives of a view.

        For an anchor: its own documents, its text, and anchors that share one of these documents.
        For a document: its anchors, its text, and the other documents of these anchors.
        """
        text, whose = self.forward.own[TEXT], self.forward.own[RING[0]]
        mine = _salted(text[:, : text.shape[1] - self.forward.hard[TEXT].shape[1]])
        back = self.backward.own
        texts = [torch.cat([text, mine, back[TEXT]], 1), torch.cat([text, back[TEXT]], 1)]
        rings = [torch.cat([whose, mine], 1), torch.cat([whose, back[RING[0]]], 1)]
        kinds = [
            torch.full_like(whose, next((kind for kind in (0, 1) if not counts[kind]), -1))
            for counts in directions.counts()
        ]
        views = directions.views
        ring = _stacked(rings[:views])
        return {TEXT: _stacked(texts[:views]), **dict.fromkeys(RING, ring), KIND: torch.cat(kinds)}

    def _counts(self, directions: Directions, own: Mapping[str, Tensor]) -> Tensor:
        """Return bool (V B, n + B): which rows of the batch compete in each view."""
        keys, count = (TEXT, *RING), len(self.queries)
        labels = [torch.cat([self.rows[key], self.anchors[key]]) for key in keys]
        found: Tensor = Exclusions(tuple(own[key] for key in keys)).admit(
            Labels(tuple(each[None, :] for each in labels)), None
        )
        sizes = torch.tensor([len(self.items), count], device=found.device)
        kinds = torch.tensor(directions.counts(), device=found.device)
        found &= kinds.repeat_interleave(sizes, 1).repeat_interleave(count, 0)
        found &= self.in_batch
        hard = self.forward.hard[TEXT] == NOTHING
        for column in range(hard.shape[1]):  # each with its own anchor
            place = torch.arange(count, device=found.device)
            found[place, (1 + column) * count + place] = hard[:, column]
        return found

    def _mean(self, values: Tensor) -> Tensor:
        weight = self.forward.weight(values.dtype)
        return (values if weight is None else values * weight).mean()


def _joined(directions: Directions, result: Any, positive: Tensor) -> Tensor:
    """Return the loss of each pair (B,) from the losses of its views.

    Both views of a joint softmax pull at the positive, by 1 - p+ each; together they should pull by
    1 - p+, or by 1 - 2 p+ if it counts twice.
    """
    training = result.training_loss.reshape(directions.views, -1)
    value = result.interpretable_loss.reshape(directions.views, -1)
    if directions.joint and directions.views > 1:
        twice = 1.0 if directions.symmetric else -torch.expm1(-value[0])
        training, value = training.sum(0) + twice * positive, value[0]
    else:
        training, value = training.mean(0), value.mean(0)
    return value + (training - training.detach())


def _mass_of_others(
    competing: Tensor, log_partition: Tensor, positive: Tensor, symmetric: bool
) -> Tensor:
    """Return (2 B,), constants: for each view, the log mass of what competes in the other."""
    known = torch.cat([competing.detach(), log_partition.to(competing)[:, None]], 1)
    first, second = torch.logsumexp(known, 1).chunk(2)
    mass = torch.cat([second, first])
    return torch.logaddexp(mass, positive.detach().repeat(2)) if symmetric else mass


def _salted(ids: Tensor) -> Tensor:
    return torch.where(ids == NO_TEXT, NO_TEXT, ids ^ _SALT)


def _stacked(parts: list[Tensor]) -> Tensor:
    """Return several ids (n, P) stacked, padding narrower ones with the id of no text."""
    widest = max(part.shape[1] for part in parts)
    spare = [part.new_full((len(part), widest - part.shape[1]), NO_TEXT) for part in parts]
    return torch.cat([torch.cat(both, 1) for both in zip(parts, spare, strict=True)])
