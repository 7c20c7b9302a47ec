"""Handlers as tf.Modules: rows, ages and generator state are variables."""

import re
from types import SimpleNamespace
from typing import Any

import tensorflow as tf

from negcache_core import CacheLossReturn, DTypeError, NegativeCache
from negcache_core.cache.restoring import warn_of_nonfinite
from negcache_core.handlers.cache_loss_handler import CacheLossHandler as _CacheLossHandler
from negcache_core.handlers.cache_loss_handler import (
    MultiCacheLossHandler as _MultiCacheLossHandler,
)
from negcache_core.handlers.step import BaseHandler
from negcache_core.sharding.placement import check_equal_shards

from ._backend import TENSORFLOW
from ._layout import Layout
from .losses import DistributedCacheClassificationLoss

__all__ = ["CacheLossHandler", "MultiCacheLossHandler"]


class _VariableHandler(BaseHandler, tf.Module):
    """A handler whose state is in variables, for eager code, `tf.function` and checkpoints."""

    backend = TENSORFLOW

    def _hold(self) -> None:
        caches = self._init_caches()
        self.layout = Layout(caches)
        aggregation = tf.VariableAggregation.ONLY_FIRST_REPLICA
        if isinstance(self.cache_loss, DistributedCacheClassificationLoss):
            aggregation = tf.VariableAggregation.NONE
        tables = {
            name: {
                "age": _variable(cache.age, f"{name}/age", aggregation),
                "data": {
                    key: _variable(rows, f"{name}/{key}", aggregation)
                    for key, rows in cache.data.items()
                },
            }
            for name, cache in caches.items()
        }
        # Where replicas hold unlike values, only the variable of each can be saved. A namespace
        # keeps what they are parts of from being tracked.
        self._live = SimpleNamespace(tables=tables)
        self.tables = tables
        if isinstance(self.cache_loss, DistributedCacheClassificationLoss):
            self.tables = tf.nest.map_structure(self.cache_loss.replicas.by_rank, tables)

    def _init_caches(self) -> dict[str, NegativeCache]:
        if isinstance(self.cache_loss, DistributedCacheClassificationLoss):
            check_equal_shards(self._managers, self.cache_loss.replicas.count)
        return super()._init_caches()

    def _caches(self) -> dict[str, NegativeCache]:
        if self.layout.restored:
            self._look_into_restored()
        return {
            name: NegativeCache(dict(table["data"]), table["age"])
            for name, table in self._live.tables.items()
        }

    @tf.autograph.experimental.do_not_convert
    def _look_into_restored(self) -> None:
        """Leave out rows of a checkpoint that are not finite, where this process sees them."""
        self.layout.restored = False
        ages = [table["age"] for table in self._live.tables.values()]
        with tf.init_scope():  # out of a tf.function that is being traced
            if tf.executing_eagerly() and not any(
                isinstance(age, tf.distribute.DistributedValues) for age in ages
            ):
                warn_of_nonfinite(int(self.evict_nonfinite()))

    def _report(self, result: CacheLossReturn) -> None:
        recording = tf.get_static_value(tf.convert_to_tensor(tf.summary.should_record_summaries()))
        if recording is None or recording:  # False unless the user set a default summary writer
            values = {
                **(result.metrics or {}),
                "interpretable_prediction_loss": result.interpretable_loss,  # the published two
                "staleness": result.staleness,
            }
            for name, value in values.items():
                tf.summary.scalar(f"cache/{name}", tf.reduce_mean(value))
        if tf.executing_eagerly():  # a traced tensor must not outlive its trace
            super()._report(result)


class CacheLossHandler(_VariableHandler, _CacheLossHandler):
    """One cache and its step; see `negcache_core.CacheLossHandler`."""


class MultiCacheLossHandler(_VariableHandler, _MultiCacheLossHandler):
    """Several caches that count as one; see `negcache_core.MultiCacheLossHandler`."""


# What the workers of a cluster can send one another when a variable is made.
_BROADCAST = (tf.bool, tf.float16, tf.float32, tf.float64, tf.int32, tf.int64)


def _variable(value: tf.Tensor, name: str, aggregation: tf.VariableAggregation) -> Any:
    strategy = tf.distribute.get_strategy()
    several = isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)
    if several and strategy.num_replicas_in_sync > 1 and value.dtype not in _BROADCAST:
        raise DTypeError(
            f"field {name!r} is {value.dtype.name}, and a MultiWorkerMirroredStrategy makes "
            f"variables of {[dtype.name for dtype in _BROADCAST]} only: choose one of these."
        )
    return tf.Variable(
        value,
        name=re.sub(r"[^A-Za-z0-9_./-]", "_", name),  # as tf.Variable requires
        trainable=False,
        aggregation=aggregation,
        synchronization=tf.VariableSynchronization.ON_READ,
    )
