"""Filters: which of a batch's items should enter the cache."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from negcache_core.arrays._array import Array, cast
from negcache_core.arrays.backend import NUMPY, Backend
from negcache_core.arrays.validation import (
    array_of,
    check_device,
    check_mapping,
    in_order,
    names_of,
)
from negcache_core.cache.matching import check_identifies, first_match, side_by_side
from negcache_core.cache.row_checks import check_castable
from negcache_core.cache.state import NegativeCache, check_cache, is_written
from negcache_core.errors import KeysError


class CacheFilterFn(ABC):
    """A function (cache, new_items) -> bool (n,): True for items that should enter. Subclass it.

    Give an instance to a handler as `new_items_filter=`. Implement `__call__(cache, new_items)`,
    where new_items has every field of the cache, (n, …) each.
    """

    backend: ClassVar[Backend] = NUMPY

    @abstractmethod
    def __call__(self, cache: NegativeCache, new_items: Mapping[str, Any]) -> Array:
        """Return the mask of the items to insert."""


class IsInCacheFilterFn(CacheFilterFn):
    """Keep out items that are in the cache: True for items that equal no written row on all `keys`.

    keys: integer or bool fields of any rank, compared exactly and together

    Give it to a handler as `new_items_filter=`: an item in the cache then keeps its one slot. Two
    equal items in one batch both pass. Cost: sorting the rows and the slots by their keys; for few
    rows, n x C comparisons for every value in a row of the keys.

    Differs from the published filter, which is never called, fails for fields that are not vectors,
    and finds zeros in slots that were never written.

    >>> import numpy as np
    >>> cache = NegativeCache({"id": np.asarray([7, 0])}, np.asarray([0, 2**31 - 1]))
    >>> IsInCacheFilterFn(keys=("id",))(cache, {"id": np.asarray([7, 8, 0])})
    array([False,  True,  True])
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self.keys = names_of(keys, "keys", "item_id", "identify an item")

    def __call__(self, cache: NegativeCache, new_items: Mapping[str, Any]) -> Array:
        """Return bool (n,). Raises KeysError, ShapeError, or DTypeError for a floating field."""
        xp = self.backend.xp
        cache = check_cache(cache, self.backend)
        check_mapping(new_items, "new_items")
        pairs = []
        for key in self.keys:
            for what, fields in (("the cache", cache.data), ("new_items", new_items)):
                if key not in fields:
                    raise KeysError(
                        f"key {key!r} is not in {what}, which has {in_order(fields)}: correct the "
                        "filter's keys."
                    )
            table, what = cache.data[key], f"new_items[{key!r}]"
            check_identifies(table.dtype, f"key {key!r}")
            expected = ("n", *tuple(table.shape)[1:])
            rows = array_of(new_items[key], expected, what, self.backend)
            check_castable(rows.dtype, table.dtype, what)
            check_device(rows, table, what, self.backend)
            pairs.append((cast(rows, table.dtype, xp), table))
        items, held = pairs[0]
        if len(pairs) > 1:
            items, held = (side_by_side(each, xp=xp) for each in zip(*pairs, strict=True))
        return ~first_match(items, held, is_written(cache.age), xp=xp)[1]
