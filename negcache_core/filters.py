"""Filters: which of a batch's items should enter the cache."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from negcache_core._array import Array, cast
from negcache_core.backend import NUMPY, Backend
from negcache_core.checks import check_castable, check_shape
from negcache_core.errors import KeysError, KindError
from negcache_core.matching import check_identifies, equal_rows
from negcache_core.state import NegativeCache, check_cache, is_written


class CacheFilterFn(ABC):
    """A function (cache, new_items) -> bool (n,): True for the items that should enter."""

    backend: ClassVar[Backend] = NUMPY

    @abstractmethod
    def __call__(self, cache: NegativeCache, new_items: Mapping[str, Any]) -> Array:
        """Return the mask of the items to insert."""


class IsInCacheFilterFn(CacheFilterFn):
    """True for items that are not in the cache: no written row equals them on all of `keys`.

    keys: integer or bool fields of any rank; they are compared exactly and together

    Give it to a handler as `new_items_filter=`, and an item that is cached keeps its one slot.
    Cost: one comparison of n x C for every value in a row of the keys. Two equal items in one batch
    both pass. Differs from the published filter, which is never called, fails for fields that are
    not vectors, and finds zeros in slots that were never written.

    >>> import numpy as np
    >>> cache = NegativeCache({"id": np.asarray([7, 0])}, np.asarray([0, 2**31 - 1]))
    >>> IsInCacheFilterFn(keys=("id",))(cache, {"id": np.asarray([7, 8, 0])})
    array([False,  True,  True])
    """

    def __init__(self, keys: Iterable[str]) -> None:
        if isinstance(keys, str) or not isinstance(keys, Iterable):
            raise KindError(
                f"keys is {keys!r}: expected several field names, such as ('item_id',)."
            )
        self.keys = tuple(keys)
        if not self.keys:
            raise KeysError("keys is empty: name the fields that identify an item.")

    def __call__(self, cache: NegativeCache, new_items: Mapping[str, Any]) -> Array:
        """Return bool (n,). Raises KeysError, ShapeError, or DTypeError for a floating field."""
        xp = self.backend.xp
        cache = check_cache(cache, self.backend)
        equal = is_written(cache.age)[None, :]
        for key in self.keys:
            for what, fields in (("the cache", cache.data), ("new_items", new_items)):
                if key not in fields:
                    raise KeysError(
                        f"key {key!r} is not in {what}, which has {sorted(fields)}: correct the "
                        "filter's keys."
                    )
            table, rows = cache.data[key], self.backend.to_array(new_items[key])
            check_identifies(table.dtype, f"key {key!r}")
            what = f"new_items[{key!r}]"
            check_castable(rows.dtype, table.dtype, what)
            check_shape(rows, ("n", *tuple(table.shape)[1:]), what)
            equal = equal & equal_rows(cast(rows, table.dtype, xp), table, xp=xp)
        return ~xp.any(equal, axis=1)
