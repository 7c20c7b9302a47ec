"""Where new rows go if an item has one slot over all shards: to the replica that stores it."""

import itertools
from collections.abc import Sequence
from typing import Any

from negcache_core.arrays._array import Array, cast, positions
from negcache_core.cache.matching import first_match, last_equal
from negcache_core.errors import CapacityError
from negcache_core.sharding.replicas import Replicas, Route


def bring_home(
    keys: Array,
    mask: Array,
    held: Array,
    written: Array,
    replicas: Replicas,
    sizes: tuple[int, ...],
    slots: Sequence[int],
    *,
    xp: Any,
) -> Route:
    """Decide which replica stores each new row if an item has one slot over all shards.

    keys:  (own rows, …) which items they are; mask: bool (own rows,), False for rows that stay out
    held:  (C, …) the items in this replica's slots; written: bool (C,)
    sizes: rows of each replica; slots: of each shard

    The replica that holds an item gets it. A new item, with all its copies, goes to the last
    replica that has it in its batch. Raises CapacityError if a shard could not hold what may come.
    """
    if sum(sizes) > min(slots):
        raise CapacityError(
            f"the replicas insert {sum(sizes)} rows a step, and with unique_key all may go to "
            f"one shard of {min(slots)} slots: raise cache_size, or insert fewer rows."
        )
    every, counted = replicas.gather([keys, mask], sizes)
    here = first_match(every, held, written, xp=xp)[1]
    (holders,) = replicas.gather([here[None, :]], (1,) * replicas.count)
    place = positions(every, xp)
    asker = place * 0
    for end in itertools.accumulate(sizes[:-1]):
        asker = asker + cast(place >= end, place.dtype, xp)
    last = last_equal(every, counted, xp=xp)
    home = xp.where(
        xp.any(holders, axis=0),
        xp.argmax(cast(holders, xp.uint8, xp), axis=0),
        xp.where(counted, xp.take_rows(asker, last), asker),
    )
    return Route(home, replicas.entries(home), sizes)
