"""The cache manager: which rows enter, stay, are refreshed, and leave."""

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, Self

from negcache_core.arrays._array import Array, cast, native_dtype
from negcache_core.arrays.backend import NUMPY, Backend
from negcache_core.arrays.validation import as_whole, check_flag, in_order
from negcache_core.arrays.words import fields_in_words
from negcache_core.cache.matching import check_identifies
from negcache_core.cache.plans import (
    WritePlan,
    grow_older,
    plan_insert,
    plan_refresh,
    plan_unique_insert,
    rows_to_write,
)
from negcache_core.cache.quantized import as_stored, scales_in, with_scales
from negcache_core.cache.row_checks import NewRows, Refresh, check_new_rows, check_refresh
from negcache_core.cache.specs import FieldSpec, as_field_specs
from negcache_core.cache.state import EMPTY, NegativeCache, check_cache
from negcache_core.errors import CapacityError, DTypeError, KeysError, KindError

Write = tuple[WritePlan, dict[str, Array]]


class UpdatePlan(NamedTuple):
    """One update: what to write, and the ages after it. Nothing is written yet.

    refresh, new_items: (WritePlan, rows by field), in the order in which they count; None for
                        nothing to write
    age:                int32 (C,) afterwards
    """

    refresh: Write | None
    new_items: Write | None
    age: Array


MOST_VALUES = 2**59
"""Values in one table, of up to eight bytes each: what a signed 64-bit size can address."""


class CacheManager:
    """Makes and updates a cache of fixed size: first in, first out, or least recently used.

    specs:      field name -> FieldSpec
    cache_size: C, the number of slots
    use_lru:    True: refreshing a row makes it as young as a new one; False: it keeps its age
    unique_key: an integer or bool field that identifies an item, such as "item_id". A new item that
                is in the cache then overwrites its own slot, so it never fills two. None: every
                item takes the oldest slot.

    The manager holds no rows: state goes in and comes out as a NegativeCache.

    Raises KeysError, KindError, DTypeError or CapacityError for an argument that cannot work.

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
        self.specs = as_field_specs(specs)
        self.cache_size = _slots(cache_size, self.specs)
        self.use_lru = check_flag(use_lru, "use_lru")
        self.unique_key = unique_key
        for spec in self.specs.values():
            native_dtype(spec.dtype, self.backend.xp)  # raises where the library lacks the dtype
        if unique_key is not None:
            _check_unique_key(unique_key, self.specs)

    def __repr__(self) -> str:
        """Return its size in words."""
        fields = fields_in_words(self.specs, self.cache_size)
        return f"{type(self).__name__}({self.cache_size:,} slots, {fields})"

    def with_size(self, cache_size: int) -> Self:
        """Return this manager with another number of slots; raise as the constructor does."""
        manager = copy.copy(self)
        manager.cache_size = _slots(cache_size, self.specs)
        return manager

    def storing(self, embedding_key: str) -> Self:
        """Return this manager with a field for the scales of embeddings, if those are int8.

        embedding_key: the embedding's field

        A handler does this itself. Raises KeysError for a field that does not exist, DTypeError if
        another field has the name of the scales'.

        >>> from negcache_core import FieldSpec
        >>> manager = CacheManager({"embedding": FieldSpec((128,), "int8")}, 1_000)
        >>> manager.storing("embedding")
        CacheManager(1,000 slots, 132.0 kB: embedding int8 (128,), embedding_scale float32 ())
        """
        if embedding_key not in list(self.specs):
            raise KeysError(
                f"embedding_key {embedding_key!r} is not among the specs {sorted(self.specs)}: "
                "name the field of embeddings."
            )
        specs = with_scales(self.specs, embedding_key, self.backend.xp.float32)
        if len(specs) == len(self.specs):
            return self
        manager = copy.copy(self)
        manager.specs = specs
        if self.unique_key is not None:
            _check_unique_key(self.unique_key, specs)
        return manager

    def init_cache(self) -> NegativeCache:
        """Return an empty cache: zero rows, every age EMPTY.

        Differs from the published code, where ages start at 0: here an unwritten slot is never
        drawn.
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
        """Return the cache after one step, as constants. The input cache is not changed.

        cache:                a NegativeCache of this manager
        new_items:            every field -> (n, …), n <= C
        new_items_mask:       bool (n,); a row where it is False changes nothing and takes no slot
        updated_item_data:    some fields -> (m, …); the other fields keep their rows
        updated_item_indices: (m,) integers, the slots to refresh. If a slot is named twice, the
                              last unmasked entry counts. Entries outside 0 … C - 1 change nothing.
        updated_item_mask:    bool (m,); an entry where it is False changes nothing

        First rows in place are refreshed. Then new items overwrite the oldest slots: empty ones
        before old ones, and the lowest slot first among equals. Then all other written rows age by
        one. With a unique_key, a new item that the refreshed cache holds overwrites its own slot
        instead. Of equal items in one batch the last unmasked one counts, and the others count as
        masked.

        Floating rows are cast to the field's dtype; integers may only widen. If an int8 field "x"
        has scales, a float32 field "x_scale" with row shape (), its rows are given as floating
        ones, without scales. They are stored as numbers from -127 to 127 and a scale each.

        Raises KeysError, ShapeError, DTypeError or CapacityError for rows that do not fit.
        """
        backend = self.backend
        cache = check_cache(cache, backend)
        cache = NegativeCache(cache.data, cast(cache.age, backend.xp.int32, backend.xp))
        refresh = check_refresh(
            updated_item_data, updated_item_indices, updated_item_mask, cache, backend
        )
        new_rows = None
        if new_items is not None:
            new_rows = check_new_rows(new_items, cache, backend, new_items_mask)
        for given in (refresh, new_rows):  # or the cache would keep the graph of every step
            if given is not None:
                for key, rows in given.rows.items():
                    given.rows[key] = backend.stop_gradient(rows)
        plan = self.plan_update(cache, refresh, new_rows)
        return NegativeCache(self._write(cache, plan, backend.xp.put_rows), plan.age)

    def plan_update(
        self, cache: NegativeCache, refresh: Refresh | None, new_rows: NewRows | None
    ) -> UpdatePlan:
        """Decide what one step writes into a sound cache, from checked rows."""
        xp, age, refreshed, inserted = self.backend.xp, cache.age, None, None
        if refresh is not None:
            plan = plan_refresh(age, refresh.slots, refresh.mask, use_lru=self.use_lru, xp=xp)
            refreshed, age = (plan, refresh.rows), plan.age
        if new_rows is not None:
            inserted = self.plan_new_items(cache, new_rows, refreshed)
            age = inserted[0].age
        return UpdatePlan(refreshed, inserted, grow_older(age, xp=xp))

    def plan_new_items(
        self, cache: NegativeCache, new: NewRows, refreshed: Write | None = None
    ) -> Write:
        """Choose the slots of new rows, after `refreshed`; no age grows."""
        xp, key = self.backend.xp, self.unique_key
        age = cache.age if refreshed is None else refreshed[0].age
        if key is None:
            return plan_insert(age, new.count, new.mask, xp=xp), new.rows
        if key not in cache.data:
            raise KeysError(
                f"unique_key {key!r} is not in the cache, which has {in_order(cache.data)}: make "
                "it with this manager's init_cache()."
            )
        held = cache.data[key]
        if refreshed is not None and key in refreshed[1]:  # an item may have become another one
            plan, rows = refreshed
            held = xp.put_rows(held, plan.slots, rows_to_write(plan, held, rows[key], xp=xp))
        keys = cast(new.rows[key], held.dtype, xp)
        return plan_unique_insert(age, held, keys, new.mask, xp=xp), new.rows

    def carry_out(self, cache: NegativeCache, plan: UpdatePlan) -> NegativeCache:
        """Write a plan and return the cache; in place, the same arrays, where the library can."""
        data = self._write(cache, plan, self.backend.write_rows)
        return NegativeCache(data, self.backend.overwrite(cache.age, plan.age))

    def _write(
        self, cache: NegativeCache, plan: UpdatePlan, write_rows: Callable[..., Array]
    ) -> dict[str, Array]:
        """Return the cache's tables after `write_rows` has put a plan's rows into each."""
        data, scales = dict(cache.data), scales_in(cache.data)
        for write in (plan.refresh, plan.new_items):
            if write is not None:
                where, rows = write
                rows = as_stored(rows, scales, self.backend.xp) if scales else rows
                for key, array in rows.items():
                    final = rows_to_write(where, data[key], array, xp=self.backend.xp)
                    data[key] = write_rows(data[key], where.slots, final)
        return data


def _slots(cache_size: Any, specs: Mapping[str, FieldSpec]) -> int:
    """Return a number of slots as an int; raise unless a cache can have so many."""
    slots = as_whole(cache_size)
    if slots is None:
        raise KindError(
            f"cache_size is {cache_size!r}: expected a positive int, the number of slots."
        )
    if slots < 1:
        raise CapacityError(f"cache_size is {cache_size}: a cache needs at least one slot.")
    for key, spec in specs.items():
        if slots * max(1, math.prod(spec.shape)) > MOST_VALUES:
            raise CapacityError(
                f"field {key!r} would have {slots} rows of shape {spec.shape}, more values than "
                "any array can hold: lower cache_size, or make the rows smaller."
            )
    return slots


def _check_unique_key(key: Any, specs: Mapping[str, Any]) -> None:
    if not isinstance(key, str):
        raise KindError(f"unique_key is {key!r}: expected one field name, or None.")
    if key not in specs:
        raise KeysError(
            f"unique_key {key!r} is not among the specs {sorted(specs)}: name an integer field "
            "that identifies an item, or add it to the specs."
        )
    check_identifies(specs[key].dtype, f"unique_key {key!r}")
    if key in scales_in(specs):
        raise DTypeError(
            f"unique_key {key!r} has the codes of quantized rows, with scales in "
            f"{scales_in(specs)[key]!r}: expected a field that identifies an item, such as "
            "'item_id'."
        )
