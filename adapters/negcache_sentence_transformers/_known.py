"""Who belongs to whom: which texts are not negatives of an anchor, in the batch and the cache."""

from typing import Any, NamedTuple

import torch
from negcache_torch import EMPTY as UNWRITTEN
from negcache_torch import FieldSpec, NegativeCache
from torch import Tensor

from negcache_core.cache.matching import first_match

from ._contents import NO_TEXT, TEXT
from ._tokens import ID

RING = tuple(f"anchor_{place}" for place in range(4))
"""Where a row keeps the last anchors whose positive it was; of more than four it forgets the oldest
one, whose negative it may be from then on."""

NOTHING = NO_TEXT - 1  # fills a ring's free places: the id of no text

RING_FIELDS = {key: FieldSpec((), torch.int64) for key in RING}


class Ids(NamedTuple):
    """A batch's texts as ids: int64.

    anchors: (B,) contents
    slots:   (n,) that identify an item's slot; n = B (1 + H), column by column
    texts:   (n,) contents; NO_TEXT for an empty one, which is nobody's negative
    """

    anchors: Tensor
    slots: Tensor
    texts: Tensor

    def of_dataset(self, number: int) -> "Ids":
        """Return ids for a data set, whose texts differ from equal texts in other data sets."""
        ids = (torch.where(each == NO_TEXT, NO_TEXT, each ^ number) for each in self)
        return Ids(*ids)


class Known(NamedTuple):
    """Facts about a batch.

    own:    key -> (B, P), ids of rows that are not negatives of an anchor
    labels: key -> (n,), what to store with the items
    hard:   key -> (B, H), labels of explicit negatives: NO_TEXT, which no anchor accepts, for those
            that do not count, and NOTHING for the others
    sound:  bool (B,), whether both the anchor and its positive have content
    share:  all processes' queries per sound one; 0 if none is sound
    """

    own: dict[str, Tensor]
    labels: dict[str, Tensor]
    hard: dict[str, Tensor]
    sound: Tensor
    share: float

    def weight(self, dtype: torch.dtype) -> Tensor | None:
        """Return the anchors' weights (B,), for a mean over the sound ones; None if all are."""
        return None if self.share == 1.0 else self.sound.to(dtype) * self.share

    def negatives(self, items: Tensor) -> dict[str, Any]:
        """Return explicit negatives (B, H, D), of items column after column, and their labels."""
        count, number = self.hard[TEXT].shape
        if not number:
            return {}
        rows = items.unflatten(0, (1 + number, count))[1:].transpose(0, 1)
        return {"hard_negative_embeddings": rows, "hard_negative_features": self.hard}


def known_of(
    ids: Ids, labels: dict[str, Tensor], cache: NegativeCache, placement: Any, xp: Any
) -> Known:
    """Return the facts about a batch, from itself, all processes' batches, and the cache.

    labels: key -> (n,), what else to store with the items
    """
    count = len(ids.anchors)
    positives = ids.texts[:count]
    sound = (ids.anchors != NO_TEXT) & (positives != NO_TEXT)
    whose = torch.full_like(ids.texts, NOTHING)
    whose[:count] = torch.where(sound, ids.anchors, NOTHING)

    columns = len(ids.texts) // count
    queries, widest = count, columns
    every, mine = torch.stack([ids.slots, ids.texts, whose], 1), slice(None)
    if placement.sharded:  # in a step, one process may have pairs and another triplets
        shapes = placement.replicas.numbers([count, columns], every)
        sizes = [rows * width for rows, width in shapes]
        queries, widest = sum(rows for rows, _ in shapes), max(width for _, width in shapes)
        first = placement.first(sizes)
        mine = slice(first, first + len(every))
        (every,) = placement.gather([every], sizes)
    slots, texts, whose = every.unbind(1)
    pairs = torch.stack([texts, whose], 1)[whose != NOTHING]

    held = _held_rings(slots.contiguous(), cache, xp)
    if placement.sharded:  # one shard has it, if any
        (rings,) = placement.gather([held[None]], (1,) * placement.replicas.count)
        held = rings.amax(0)
    ring = _joined(_partners(ids.texts, pairs, len(RING)), held[mine])

    by_column = torch.cat([ids.texts[:, None], ring], 1).reshape(columns, count, 1 + len(RING))
    negatives, theirs = by_column[1:].transpose(0, 1).tensor_split([1], 2)
    negatives = negatives[:, :, 0]
    most = _most(pairs[:, 1])
    also = _partners(ids.anchors, pairs.flip(1), most)
    also = torch.where(also == NOTHING, NO_TEXT, also)
    no_text = torch.full_like(positives, NO_TEXT)
    spare = [no_text] * (1 + widest - columns)  # exchanged ids are padded to the widest
    own = torch.cat([torch.stack([positives, ids.anchors, *spare], 1), also], 1)
    twice = (negatives[:, :, None] == negatives[:, None, :]).tril(-1).any(2)
    positive = (theirs == ids.anchors[:, None, None]).any(2)
    out = (negatives[:, :, None] == own[:, None, :]).any(2) | positive | twice
    hard = dict.fromkeys(RING, torch.full_like(negatives, NOTHING))
    hard |= {key: value.reshape(columns, count)[1:].T for key, value in labels.items() if key != ID}

    return Known(
        {TEXT: torch.cat([own, negatives], 1), **dict.fromkeys(RING, ids.anchors[:, None])},
        {**labels, TEXT: ids.texts, **dict(zip(RING, ring.unbind(1), strict=True))},
        {TEXT: torch.where(out, NO_TEXT, NOTHING), **hard},
        sound,
        queries / len(pairs) if len(pairs) else 0.0,
    )


def enters(_: NegativeCache, new_items: Any) -> Tensor:
    """Return which of a batch's items enter the cache: those with content."""
    found: Tensor = new_items[TEXT] != NO_TEXT
    return found


def _held_rings(slots: Tensor, cache: NegativeCache, xp: Any) -> Tensor:
    """Return (n, K): the anchors that the cache knows for items (n,)."""
    data: Any = cache.data
    place, found = first_match(slots, data[ID], cache.age != UNWRITTEN, xp=xp)
    rings = torch.stack([data[key][place] for key in RING], 1)
    return torch.where(found[:, None], rings, NOTHING)


def _partners(keys: Tensor, pairs: Tensor, width: int) -> Tensor:
    """Return (n, width): partners of keys (n,) in pairs (m, 2), each once, padded with NOTHING."""
    if not len(pairs) or not width:
        return keys.new_full((len(keys), width), NOTHING)
    pairs = torch.unique(pairs, dim=0)  # in order
    first, second = pairs.T.contiguous()
    place = torch.searchsorted(first, keys.contiguous())[:, None]
    place = place + torch.arange(width, device=keys.device)
    inside = place.clamp(max=len(pairs) - 1)
    hit = (place < len(pairs)) & (first[inside] == keys[:, None])
    return torch.where(hit, second[inside], NOTHING)


def _most(keys: Tensor) -> int:
    """Return how often the most frequent of keys (m,) occurs; 0 if each occurs once."""
    if not len(keys):
        return 0
    most = int(torch.unique(keys, return_counts=True)[1].max())
    return most if most > 1 else 0


def _joined(new: Tensor, old: Tensor) -> Tensor:
    """Return rings (n, K) merged from two: the new anchors, then as many old ones as fit."""
    old = torch.where((old[:, :, None] == new[:, None, :]).any(2), NOTHING, old)
    both = torch.cat([new, old], 1)
    order = torch.argsort((both == NOTHING).to(torch.uint8), dim=1, stable=True)
    return both.gather(1, order)[:, : new.shape[1]]
