"""The cache manager: which rows enter, stay, are refreshed, and leave."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

from negcache_core.arrays._array import Array, cast, native_dtype, put_rows
from negcache_core.arrays.backend import NUMPY, Backend
from negcache_core.arrays.validation import as_whole, check_flag, in_order
from negcache_core.cache.matching import check_identifies
from negcache_core.cache.plans import (
    WritePlan,
    grow_older,
    plan_insert,
    plan_refresh,
    plan_unique_insert,
    rows_to_write,
)
from negcache_core.cache.row_checks import check_mask, check_new_rows, check_refresh
from negcache_core.cache.specs import as_field_specs
from negcache_core.cache.state import EMPTY, NegativeCache, check_cache
from negcache_core.errors import CapacityError, KeysError, KindError


class UpdatePlan(NamedTuple):
    """One checked update: what to write, and the ages after it. Nothing is written yet.

    refresh, new_items: (WritePlan, rows by field), or None where there is nothing to write
    age:                int32 (C,) afterwards
    """

    refresh: tuple[WritePlan, dict[str, Array]] | None
    new_items: tuple[WritePlan, dict[str, Array]] | None
    age: Array

    def writes(self) -> list[tuple[WritePlan, dict[str, Array]]]:
        """Return the writes in the order in which they count."""
        return [write for write in (self.refresh, self.new_items) if write is not None]


MOST_VALUES = 2**59
"""Values in one table, of up to eight bytes each: what a signed 64-bit size can address."""


class CacheManager:
    """Makes and updates a cache of fixed capacity, first in first out or least recently used.

    specs:      field name -> FieldSpec
    cache_size: capacity C, the number of slots
    use_lru:    True: refreshing a row makes it as young as a new one; False: it keeps its age
    unique_key: an integer or bool field that identifies an item, such as "item_id": a new item
                that is in the cache overwrites its own slot, so that it never fills two. None: any
                item takes the oldest slot.

    Raises KeysError, KindError, DTypeError or CapacityError on an argument that cannot work.
    The manager holds no rows: state goes in and comes out as a NegativeCache.
    Source: the paper's streaming cache, section 3.2, and the published `CacheManager`.

    >>> from negcache_core import FieldSpec
    >>> manager = CacheManager({"embedding": FieldSpec((2,), "float32")}, cache_size=3)
    >>> cache = manager.init_cache()
    >>> cache = manager.update_cache(cache, new_items={"embedding": [[1.0, 2.0]]})
    >>> cache.data["embedding"][0]
    array([1., 2.], dtype=float32)
    >>> cache.age
    array([         0, 2147483647, 2147483647], dtype=int32)
    """

    backend: ClassVar[Backend] = NUMPY

    def __init__(
        self,
        specs: Mapping[str, Any],
        cache_size: int,
        use_lru: bool = True,
        *,
        unique_key: str | None = None,
    ) -> None:
        slots = as_whole(cache_size)
        if slots is None:
            raise KindError(
                f"cache_size is {cache_size!r}: expected a positive int, the number of slots."
            )
        if slots < 1:
            raise CapacityError(f"cache_size is {cache_size}: a cache needs at least one slot.")
        self.specs = as_field_specs(specs)
        for key, spec in self.specs.items():
            if slots * max(1, math.prod(spec.shape)) > MOST_VALUES:
                raise CapacityError(
                    f"field {key!r} would have {slots} rows of shape {spec.shape}, more values "
                    "than any array can: lower cache_size, or make the rows smaller."
                )
        self.cache_size = slots
        self.use_lru = check_flag(use_lru, "use_lru")
        self.unique_key = unique_key
        for spec in self.specs.values():
            native_dtype(spec.dtype, self.backend.xp)  # raises where the library lacks the dtype
        if unique_key is not None:
            _check_unique_key(unique_key, self.specs)

    def init_cache(self) -> NegativeCache:
        """Return a cache of zero rows, every age EMPTY.

        Differs from the 2021 code, where ages start at 0: here an unwritten slot is never drawn.
        """
        return self.init_shard(self.cache_size)

    def init_shard(self, slots: int) -> NegativeCache:
        """Return what `init_cache` does with some of the slots: one replica's part of the cache."""
        xp = self.backend.xp
        data = {
            key: xp.zeros((slots, *spec.shape), dtype=native_dtype(spec.dtype, xp))
            for key, spec in self.specs.items()
        }
        return NegativeCache(data, xp.full((slots,), EMPTY, dtype=xp.int32))

    def plan_update(
        self,
        cache: NegativeCache,
        *,
        new_items: Mapping[str, Any] | None = None,
        new_items_mask: Any = None,
        updated_item_data: Mapping[str, Any] | None = None,
        updated_item_indices: Any = None,
        updated_item_mask: Any = None,
    ) -> UpdatePlan:
        """Check an update and decide what it writes, without writing; see `update_cache`."""
        backend, xp = self.backend, self.backend.xp
        cache = self._own(cache)
        age, refresh, insert = cache.age, None, None
        refresh_args = (updated_item_data, updated_item_indices, updated_item_mask)
        if any(argument is not None for argument in refresh_args):
            rows, indices, mask = check_refresh(*refresh_args, cache, backend)
            plan = plan_refresh(age, indices, mask, use_lru=self.use_lru, xp=xp)
            refresh, age = (plan, rows), plan.age
        if new_items is not None:
            insert = self.plan_new_items(cache, new_items, new_items_mask, refresh)
            age = insert[0].age
        return UpdatePlan(refresh, insert, grow_older(age, xp=xp))

    def plan_new_items(
        self,
        cache: NegativeCache,
        new_items: Mapping[str, Any],
        mask: Any = None,
        refresh: tuple[WritePlan, dict[str, Array]] | None = None,
    ) -> tuple[WritePlan, dict[str, Array]]:
        """Check rows to insert after `refresh`, and choose their slots; no age grows."""
        xp, key, cache = self.backend.xp, self.unique_key, self._own(cache)
        age = cache.age if refresh is None else refresh[0].age
        rows, count = self.check_new_items(cache, new_items)
        mask = check_mask(mask, count, "new_items_mask", self.backend, like=cache.age)
        if key is None:
            return plan_insert(age, count, mask, xp=xp), rows
        if key not in cache.data:
            raise KeysError(
                f"unique_key {key!r} is not in the cache, which has {in_order(cache.data)}: make "
                "it with this manager's init_cache()."
            )
        held = cache.data[key]
        if refresh is not None and key in refresh[1]:  # an item may have become another one
            plan, refreshed = refresh
            held = put_rows(held, plan.slots, rows_to_write(plan, held, refreshed[key], xp=xp), xp)
        return plan_unique_insert(age, held, cast(rows[key], held.dtype, xp), mask, xp=xp), rows

    def check_new_items(
        self, cache: NegativeCache, new_items: Mapping[str, Any]
    ) -> tuple[dict[str, Array], Any]:
        """Raise unless `new_items` could be inserted; return them as arrays, and their number."""
        return check_new_rows(new_items, cache, self.backend)

    def update_cache(
        self,
        cache: NegativeCache,
        *,
        new_items: Mapping[str, Any] | None = None,
        new_items_mask: Any = None,
        updated_item_data: Mapping[str, Any] | None = None,
        updated_item_indices: Any = None,
        updated_item_mask: Any = None,
    ) -> NegativeCache:
        """Return the cache after one step; the input cache is never changed.

        First rows in place are refreshed, then new items overwrite the oldest slots (empty before
        old, ties to the lowest slot), then all other written rows grow older by one. With a
        unique_key, a new item that the refreshed cache holds overwrites its own slot instead; of
        equal items in one batch the last unmasked one counts, and the others count as masked.

        new_items:            every field -> (n, …), n <= C
        new_items_mask:       bool (n,); a row where it is False touches nothing and takes no slot
        updated_item_data:    some fields -> (m, …); fields that are not named keep their rows
        updated_item_indices: integers (m,), the slots to refresh; where one is named twice the last
                              unmasked entry counts, and entries outside 0 … C - 1 touch nothing
        updated_item_mask:    bool (m,); an entry where it is False touches nothing

        Floating rows are cast to the field's dtype; integers may only widen.
        Raises KeysError, ShapeError, DTypeError or CapacityError.
        """
        plan = self.plan_update(
            cache,
            new_items=new_items,
            new_items_mask=new_items_mask,
            updated_item_data=updated_item_data,
            updated_item_indices=updated_item_indices,
            updated_item_mask=updated_item_mask,
        )
        xp = self.backend.xp
        data = dict(self._own(cache).data)
        for write, rows_by_key in plan.writes():
            for key, rows in rows_by_key.items():
                final = rows_to_write(write, data[key], rows, xp=xp)
                data[key] = put_rows(data[key], write.slots, final, xp)
        return NegativeCache(data, plan.age)

    def carry_out(self, cache: NegativeCache, plan: UpdatePlan) -> NegativeCache:
        """Write a plan and return the cache; in place, the same arrays, where the library can."""
        backend, data = self.backend, dict(cache.data)
        for write, rows_by_key in plan.writes():
            for key, rows in rows_by_key.items():
                final = rows_to_write(write, data[key], rows, xp=backend.xp)
                data[key] = backend.write_rows(data[key], write.slots, final)
        return NegativeCache(data, backend.overwrite(cache.age, plan.age))

    def _own(self, cache: NegativeCache) -> NegativeCache:
        """Return `cache` checked, with ages of int32."""
        cache = check_cache(cache, self.backend)
        return NegativeCache(cache.data, cast(cache.age, self.backend.xp.int32, self.backend.xp))


def _check_unique_key(key: Any, specs: Mapping[str, Any]) -> None:
    if not isinstance(key, str):
        raise KindError(f"unique_key is {key!r}: expected one field name, or None.")
    if key not in specs:
        raise KeysError(
            f"unique_key {key!r} is not among the specs {sorted(specs)}: name an integer field "
            "that identifies an item, or add it to the specs."
        )
    check_identifies(specs[key].dtype, f"unique_key {key!r}")
