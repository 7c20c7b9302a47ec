"""Where a cache's state lives in TensorFlow: in variables, also for `tf.function`."""

import re
from types import SimpleNamespace
from typing import Any

import tensorflow as tf

from negcache_core import DTypeError, NegativeCache, OptionError
from negcache_core.adapter import Caches, Setup, Store
from negcache_core.cache.restoring import warn_of_nonfinite
from negcache_core.handlers import checkpoint
from negcache_core.sharding.placement import check_equal_shards

from ._layout import Layout

WINDOW = "negcache window"
"""Beside the caches' names; theirs are the user's."""


class VariableStore(Store):
    """The caches of a handler as variables, which checkpoints find under its `tables`."""

    def __init__(self, setup: Setup) -> None:
        placement: Any = setup.placement  # the replicas that share shards
        aggregation = tf.VariableAggregation.ONLY_FIRST_REPLICA
        if placement.sharded:
            check_equal_shards(setup.managers, placement.replicas.count)
            aggregation = tf.VariableAggregation.NONE
        caches = setup.init_caches()
        self.setup, self.layout = setup, Layout(caches)
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
        window = None
        if caches.window is not None:
            window = _variable(caches.window, "window", aggregation)
        # A namespace keeps its contents from being tracked.
        self._live = SimpleNamespace(tables=tables, window=window)

    def attach(self, handler: tf.Module) -> None:
        """Let the handler's checkpoints find the variables.

        If replicas hold different values, only each one's variable can be saved.
        """
        placement: Any = self.setup.placement
        tables = dict(self._live.tables)
        if self._live.window is not None:
            tables[WINDOW] = self._live.window
        if placement.sharded:
            tables = tf.nest.map_structure(placement.replicas.by_rank, tables)
        handler.tables, handler.layout = tables, self.layout

    def read(self) -> Caches:
        """Return the live variables."""
        if self.layout.restored:
            self._look_into_restored()
        caches = {
            name: NegativeCache(dict(table["data"]), table["age"])
            for name, table in self._live.tables.items()
        }
        return Caches(caches, self._live.window)

    def write(self, caches: Caches) -> None:
        """Do nothing: variables are written in place."""
        del caches  # not an empty body: AutoGraph would warn

    def replace(self, caches: Caches) -> None:
        """Raise OptionError: variables keep their shapes, as do functions traced with them."""
        del caches
        raise OptionError(
            "resize changes shapes, but TensorFlow's variables keep theirs: make a new handler "
            "with the new cache_size, and call new.load(path, resize=True) on what this one's "
            "save(path) wrote, or new.restore(handler.cache, resize=True)."
        )

    @tf.autograph.experimental.do_not_convert
    def _look_into_restored(self) -> None:
        """Drop rows of a checkpoint that are not finite, if this process sees them."""
        self.layout.restored = False
        ages = [table["age"] for table in self._live.tables.values()]
        with tf.init_scope():  # outside any tf.function that is being traced
            if tf.executing_eagerly() and not any(
                isinstance(age, tf.distribute.DistributedValues) for age in ages
            ):
                warn_of_nonfinite(int(checkpoint.evict_nonfinite(self.setup, self)))


# What the workers of a cluster can send each other when a variable is made.
_BROADCAST = (tf.bool, tf.float16, tf.float32, tf.float64, tf.int32, tf.int64)


def _variable(value: tf.Tensor, name: str, aggregation: tf.VariableAggregation) -> Any:
    strategy = tf.distribute.get_strategy()
    several = isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)
    if several and strategy.num_replicas_in_sync > 1 and value.dtype not in _BROADCAST:
        raise DTypeError(
            f"field {name!r} is {value.dtype.name}, but a MultiWorkerMirroredStrategy makes only "
            f"variables of {[dtype.name for dtype in _BROADCAST]}: choose one of these."
        )
    return tf.Variable(
        value,
        name=re.sub(r"[^A-Za-z0-9_./-]", "_", name),  # as tf.Variable requires
        trainable=False,
        aggregation=aggregation,
        synchronization=tf.VariableSynchronization.ON_READ,
    )
