"""A whole cache on every replica: each writes everyone's rows (`use_cross_replica`)."""

from typing import Any, NamedTuple

from negcache_core.arrays._array import Array, cast, length
from negcache_core.arrays.backend import Backend
from negcache_core.cache.row_checks import CheckedRows, NewRows, Refresh
from negcache_core.losses.results import CacheLossReturn


class Mirrored(NamedTuple):
    """The replicas of a group, whose caches stay equal."""

    group: Any
    backend: Backend

    def gather(self, array: Array) -> Array:
        """Return rows (n, …) of all replicas."""
        return self.backend.all_gather(array, self.group)

    def new_rows(self, new: NewRows) -> NewRows:
        """Return the new rows of all replicas."""
        rows = CheckedRows({key: self.gather(array) for key, array in new.rows.items()})
        count = length(next(iter(rows.values())), self.backend.xp)
        return NewRows(rows, count, None if new.mask is None else self.gather(new.mask))

    def refresh(self, refresh: Refresh | None) -> Refresh | None:
        """Return the refreshed rows of all replicas."""
        if refresh is None:
            return None
        rows = {key: self.gather(array) for key, array in refresh.rows.items()}
        mask = None if refresh.mask is None else self.gather(refresh.mask)
        return Refresh(rows, self.gather(refresh.slots), mask)

    def weighted(self, result: CacheLossReturn, queries: Array) -> CacheLossReturn:
        """Weigh a replica's mean by its share of all queries.

        Then the mean over replicas, which data-parallel training takes of gradients, is the mean
        over the whole batch, whatever its parts are.
        """
        xp = self.backend.xp
        ones = xp.zeros_like(result.training_loss)[None] + 1.0
        own = cast(length(queries, xp) * ones, ones.dtype, xp)
        average = xp.mean(self.gather(self.backend.stop_gradient(own)))  # unknown while tracing
        share = own[0] / xp.where(average > 0, average, 1.0)
        return result._replace(
            training_loss=share * result.training_loss,
            interpretable_loss=share * result.interpretable_loss,
            loss=None if result.loss is None else share * result.loss,
        )
