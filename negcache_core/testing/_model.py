"""A cache as a plain dict, slow and obvious, to check a manager's updates against."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from negcache_core.cache.state import EMPTY, OLDEST

Row = Mapping[str, Any]


class DictCache:
    """A model of a cache: slot -> row and slot -> age, with every rule spelled out.

    capacity:   number of slots
    zeros:      the row of a slot that was never written
    use_lru, unique_key: as in CacheManager

    `held` has a row for every slot, `age` an age for each written slot.

    >>> model = DictCache(2, {"id": 0})
    >>> model.update(new_items=[({"id": 7}, True)])
    >>> model.update()
    >>> model.held, model.ages()
    ({0: {'id': 7}, 1: {'id': 0}}, [1, 2147483647])
    """

    def __init__(
        self, capacity: int, zeros: Row, *, use_lru: bool = True, unique_key: str | None = None
    ) -> None:
        self.capacity, self.use_lru, self.unique_key = capacity, use_lru, unique_key
        self.held: dict[int, dict[str, Any]] = {slot: dict(zeros) for slot in range(capacity)}
        self.age: dict[int, int] = {}

    def ages(self) -> list[int]:
        """Return every slot's age, EMPTY where no row was written."""
        return [self.age.get(slot, EMPTY) for slot in range(self.capacity)]

    def update(
        self,
        refresh: Iterable[tuple[int, Row, bool]] = (),
        new_items: Iterable[tuple[Row, bool]] = (),
    ) -> None:
        """Do what `update_cache` does.

        refresh:   (slot, the fields to write, whether it counts), in the order of the entries
        new_items: (row, whether it counts)
        """
        young = set()
        for slot, fields, counts in refresh:
            if counts and 0 <= slot < self.capacity:
                self.held[slot].update(fields)
                if self.use_lru:
                    young.add(slot)
        kept = [row for row, counts in new_items if counts]
        own: set[int] = set()
        if self.unique_key is not None:
            kept, own = self._put_in_own_slots(kept, self.unique_key, {*self.age, *young})

        def oldest_first(slot: int) -> tuple[float, int]:
            if slot in young:
                return (1, slot)
            return (-self.age.get(slot, EMPTY), slot)

        order = sorted({*range(self.capacity)} - own, key=oldest_first)
        for slot, row in zip(order, kept, strict=False):
            self.held[slot] = dict(row)
            young.add(slot)
        self.age = {slot: min(age + 1, OLDEST) for slot, age in self.age.items()}
        self.age.update(dict.fromkeys(young | own, 0))

    def oldest(self, count: int) -> list[int]:
        """Return up to `count` written slots, the oldest first: what `refresh` embeds."""
        return sorted(self.age, key=lambda slot: (-self.age[slot], slot))[:count]

    def reembed(self, slot: int, fields: Row) -> None:
        """Write what `refresh` embedded: the row is as young as a new one, and no other ages."""
        self.held[slot].update(fields)
        self.age[slot] = 0

    def _put_in_own_slots(
        self, rows: list[Row], key: str, written: Collection[int]
    ) -> tuple[list[Row], set[int]]:
        """Overwrite the rows of items in the cache; return the other items and written slots."""
        slot_of = {self.held[slot][key]: slot for slot in sorted(written, reverse=True)}
        others, own = [], set()
        for place, row in enumerate(rows):
            if row[key] in [later[key] for later in rows[place + 1 :]]:
                continue
            if row[key] in slot_of:
                self.held[slot_of[row[key]]] = dict(row)
                own.add(slot_of[row[key]])
            else:
                others.append(row)
        return others, own
