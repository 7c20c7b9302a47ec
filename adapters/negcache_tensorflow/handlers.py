"""Handlers as tf.Modules: rows, ages and generator state are variables."""

import re

import tensorflow as tf

from negcache_core import CacheLossReturn, NegativeCache
from negcache_core.handlers import BaseHandler
from negcache_core.handlers import CacheLossHandler as _CacheLossHandler
from negcache_core.handlers import MultiCacheLossHandler as _MultiCacheLossHandler

from ._backend import TENSORFLOW

__all__ = ["CacheLossHandler", "MultiCacheLossHandler"]


class _VariableHandler(BaseHandler, tf.Module):
    """A handler whose state is in variables, for eager code, `tf.function` and checkpoints."""

    backend = TENSORFLOW

    def _hold(self) -> None:
        caches = self._init_caches()
        self.tables = {
            name: {
                "age": _variable(cache.age, f"{name}/age"),
                "data": {key: _variable(rows, f"{name}/{key}") for key, rows in cache.data.items()},
            }
            for name, cache in caches.items()
        }

    def _caches(self) -> dict[str, NegativeCache]:
        return {
            name: NegativeCache(dict(table["data"]), table["age"])
            for name, table in self.tables.items()
        }

    def _report(self, result: CacheLossReturn) -> None:
        recording = tf.get_static_value(tf.convert_to_tensor(tf.summary.should_record_summaries()))
        if recording is None or recording:  # False unless the user set a default summary writer
            for name, values in (
                ("cache/interpretable_prediction_loss", result.interpretable_loss),
                ("cache/staleness", result.staleness),
            ):
                tf.summary.scalar(name, tf.reduce_mean(values))
        if tf.executing_eagerly():  # a traced tensor must not outlive its trace
            super()._report(result)


class CacheLossHandler(_VariableHandler, _CacheLossHandler):
    """One cache and its step; see `negcache_core.CacheLossHandler`."""


class MultiCacheLossHandler(_VariableHandler, _MultiCacheLossHandler):
    """Several caches that count as one; see `negcache_core.MultiCacheLossHandler`."""


def _variable(value: tf.Tensor, name: str) -> tf.Variable:
    return tf.Variable(
        value,
        name=re.sub(r"[^A-Za-z0-9_./-]", "_", name),  # as tf.Variable requires
        trainable=False,
        aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
        synchronization=tf.VariableSynchronization.ON_READ,
    )
