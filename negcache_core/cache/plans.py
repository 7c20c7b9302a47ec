"""Plans: which slots a step writes, and with which of the given rows.

A plan is a few small integer arrays. Deciding is pure, and is done here; copying rows is left to
`put_rows` or to an adapter's in-place write, so both do the same thing. Shapes depend on the
number of rows alone, never on a mask's values, so a plan can be traced and compiled.
"""

from typing import Any, NamedTuple

from negcache_core.arrays._array import (
    Array,
    cast,
    fill,
    largest,
    length,
    mask_rows,
    namespace,
    positions,
)
from negcache_core.cache.matching import first_match, last_of_each
from negcache_core.cache.state import OLDEST, is_written
from negcache_core.errors import CapacityError

NEW = -1  # the age of a row written in this step, before all ages grow by one


def too_many_rows(rows: int, capacity: int) -> CapacityError:
    """Return the error for a batch that does not fit."""
    return CapacityError(
        f"cannot insert {rows} rows into a cache of {capacity} slots: each step would overwrite "
        "itself. Raise cache_size, or insert fewer rows."
    )


class WritePlan(NamedTuple):
    """What n entries write: entry e puts row `source[e]` into `slots[e]`.

    slots:  (n,) slots; where one is named twice, both entries write the same row
    source: (n,) positions in the given rows; None for 0, 1, …, n - 1
    live:   (n,) bool, False where the slot is rewritten with its own row; None if all are live
    age:    int32 (C,) afterwards, with this step's rows at -1: `grow_older` ends the step
    """

    slots: Array
    source: Array | None
    live: Array | None
    age: Array


def plan_insert(age: Array, n_new: Any, mask: Array | None = None, *, xp: Any = None) -> WritePlan:
    """Choose the slots that the next rows overwrite: empty first, then oldest.

    age:   int32 array (C,), EMPTY where no row was ever written
    n_new: rows to insert, 0 <= n_new <= C
    mask:  bool (n_new,); rows where it is False touch nothing and take up no slot

    Ties go to the lowest slot, so all backends agree. All slots of the plan are distinct.
    Raises CapacityError if n_new > C.

    >>> import numpy as np
    >>> plan_insert(np.asarray([4, 9, 0, 9], dtype=np.int32), 2).slots
    array([1, 3])
    """
    xp = namespace(age, xp=xp)
    if isinstance(n_new, int) and n_new > age.shape[0]:
        raise too_many_rows(n_new, age.shape[0])
    slots = largest(age, n_new, xp)
    if mask is None:
        source, live, age_of_slot = None, None, xp.full_like(slots, NEW, dtype=age.dtype)
    else:
        # The rows to keep come first and so meet the oldest slots.
        source = xp.argsort(xp.astype(~mask, xp.int32), stable=True)
        live = xp.take_rows(mask, source)
        age_of_slot = xp.where(live, NEW, xp.take_rows(age, slots))
    return WritePlan(slots, source, live, xp.put_rows(age, slots, age_of_slot))


def plan_unique_insert(
    age: Array, table: Array, keys: Array, mask: Array | None = None, *, xp: Any = None
) -> WritePlan:
    """Choose the slots that the next rows overwrite if each item has one slot: its own, if any.

    age:   int32 array (C,), EMPTY where no row was ever written
    table: (C, …) what identifies the items in the slots
    keys:  (n, …) what identifies the rows to insert, of the table's dtype, n <= C
    mask:  bool (n,); rows where it is False touch nothing and take up no slot

    Of equal keys the last unmasked row counts; the earlier ones count as masked. A row whose key
    is in a written slot goes there (to the lowest one, if several hold it). The rest take, in
    order, the slots that `plan_insert` would choose among the others. All slots of
    the plan are distinct. Raises CapacityError if n > C.

    >>> import numpy as np
    >>> plan = plan_unique_insert(np.asarray([4, 9, 0], dtype=np.int32),
    ...                           np.asarray([7, 8, 9]), np.asarray([5, 8, 6]))
    >>> plan.slots, plan.source  # 5 and 6 go to slots 0 and 2; 8 to slot 1, though it is the oldest
    (array([0, 2, 1]), array([0, 2, 1]))
    """
    xp = namespace(age, keys, xp=xp)
    capacity, count = age.shape[0], length(keys, xp)
    if isinstance(count, int) and count > capacity:
        raise too_many_rows(count, capacity)
    live = last_of_each(keys, mask, xp=xp)
    own, found = first_match(keys, table, is_written(age), xp=xp)
    found = found & live
    # Slots of items in the cache rank below all others, even those refreshed in this step.
    # Entries without a slot write to an extra place, which is cut off.
    rank = xp.concat([age, fill((1,), 0, age, xp)])
    below = xp.full_like(own, NEW - 1, dtype=age.dtype)
    rank = xp.put_rows(rank, xp.where(found, own, capacity), below)[:capacity]
    others = largest(rank, count, xp)
    # New items come first and so meet the oldest slots, then rows that touch nothing. Both
    # together are at most as many as the slots that no item of the batch owns: no slot repeats.
    turn = cast(~live, xp.int32, xp) + 2 * cast(found, xp.int32, xp)
    source = xp.argsort(turn, stable=True)
    slots = xp.where(xp.take_rows(found, source), xp.take_rows(own, source), others)
    live = xp.take_rows(live, source)
    age_of_slot = xp.where(live, NEW, xp.take_rows(age, slots))
    return WritePlan(slots, source, live, xp.put_rows(age, slots, age_of_slot))


def plan_refresh(
    age: Array, indices: Array, mask: Array | None = None, *, use_lru: bool = True, xp: Any = None
) -> WritePlan:
    """Resolve a refresh of `indices` so that each slot has one writer: the last entry naming it.

    age:     int32 array (C,)
    indices: integer array (n,) of slots; entries outside 0 … C - 1 touch nothing
    mask:    bool (n,); entries where it is False touch nothing
    use_lru: whether a refreshed row counts as new

    Differs from the 2021 code, which scatters duplicates in no defined order. Only the n indices
    are sorted.

    >>> import numpy as np
    >>> plan = plan_refresh(np.asarray([4, 9, 0], dtype=np.int32), np.asarray([2, 1, 2]))
    >>> plan.slots, plan.source, plan.age
    (array([1, 2, 2]), array([1, 2, 2]), array([ 4, -1, -1], dtype=int32))
    """
    xp = namespace(age, indices, xp=xp)
    capacity = length(age, xp)
    wanted = cast(indices, xp.index_dtype, xp)
    valid = (wanted >= 0) & (wanted < capacity)
    if mask is not None:
        valid = valid & mask
    # One extra entry, which never wins, keeps every gather below defined when n is 0.
    key = xp.concat([xp.where(valid, wanted, capacity), fill((1,), capacity, wanted, xp)])
    order = xp.argsort(key, stable=True)
    ordered = xp.take_rows(key, order)
    wins = (ordered[:-1] != ordered[1:]) & (ordered[:-1] < capacity)
    # Entries that lost or were masked repeat one winner's write.
    place = xp.where(wins, positions(wins, xp), 0)
    place = xp.where(wins, place, xp.max(xp.concat([place, fill((1,), 0, place, xp)])))
    any_live = ordered[:1] < capacity
    slots = xp.where(any_live, xp.take_rows(ordered, place), 0)
    source = xp.where(any_live, xp.take_rows(order, place), 0)
    live = any_live & (slots >= 0)
    if use_lru:
        age = xp.put_rows(age, slots, xp.where(live, NEW, xp.take_rows(age, slots)))
    return WritePlan(slots, source, live, age)


def oldest_written(age: Array, count: int, *, xp: Any = None) -> tuple[Array, Array]:
    """Return (count,) the slots of the oldest written rows, and bool (count,) which entries count.

    If fewer are written, the oldest one fills the remaining entries, which do not count. So no row
    of zeros is chosen unless no row was written at all. Ties go to the lowest slot.

    >>> import numpy as np
    >>> from negcache_core import EMPTY
    >>> oldest_written(np.asarray([4, EMPTY, 9], dtype=np.int32), 3)
    (array([2, 0, 2]), array([ True,  True, False]))
    """
    xp = namespace(age, xp=xp)
    written = is_written(age)
    slots = largest(xp.where(written, age, NEW), count, xp)
    live = xp.take_rows(written, slots)
    return xp.where(live, slots, slots[:1]), live


def plan_reembed(
    age: Array, slots: Array, live: Array, finite: Array, *, xp: Any = None
) -> WritePlan:
    """Plan to write fresh embeddings at the slots that `oldest_written` chose; no other age grows.

    finite: bool (n,); where it is False the slot keeps its embedding and its age

    >>> import numpy as np
    >>> age, yes = np.asarray([4, 9, 0], dtype=np.int32), np.asarray([True, True])
    >>> plan_reembed(age, np.asarray([1, 0]), yes, np.asarray([True, False])).age
    array([4, 0, 0], dtype=int32)
    """
    xp = namespace(age, slots, xp=xp)
    # Fill-in entries repeat the first entry's write: a slot named twice gets one row.
    source = xp.where(live, positions(slots, xp), 0)
    live = xp.take_rows(live & finite, source)
    age_of_slot = xp.where(live, 0, xp.take_rows(age, slots))
    return WritePlan(slots, source, live, xp.put_rows(age, slots, age_of_slot))


def grow_older(age: Array, *, xp: Any = None) -> Array:
    """End a step: rows at -1 become 0, other written rows age by one, empty slots stay EMPTY.

    Ages stop at 2**31 - 2, one below EMPTY, so that a row never turns into an empty slot.

    >>> import numpy as np
    >>> from negcache_core import EMPTY
    >>> grow_older(np.asarray([-1, 7, EMPTY], dtype=np.int32))
    array([         0,          8, 2147483647], dtype=int32)
    """
    xp = namespace(age, xp=xp)
    return age + cast(age < OLDEST, age.dtype, xp)


def rows_to_write(plan: WritePlan, table: Array, rows: Array, *, xp: Any = None) -> Array:
    """Return (n, …) what the plan's entries write into `table` (C, …), in the table's dtype."""
    xp = namespace(table, rows, xp=xp)
    rows = cast(rows, table.dtype, xp)
    if plan.source is None or plan.live is None:
        return rows
    held = xp.take_rows(table, plan.slots)
    return xp.where(mask_rows(plan.live, held), xp.take_rows(rows, plan.source), held)
