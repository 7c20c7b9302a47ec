"""negcache's classes in TensorFlow; mypy reads their types from _bound.pyi."""

import contextlib
from typing import Any

import tensorflow as tf

from negcache_core import CacheLossReturn, KindError, OptionError
from negcache_core.adapter import bind

from ._backend import TENSORFLOW
from ._replicas import StrategyReplicas
from ._store import VariableStore


class _DistributedLoss:
    """Cross-entropy against a cache that is cut into equal shards, one on each replica.

    group: leave it out: the replicas are those of the strategy in whose scope the loss is made

    Make the loss and its handler inside `strategy.scope()`, and call them in `strategy.run`.
    Replicas need batches of one size, known when traced: batch a dataset with drop_remainder=True.
    A generator made from None or a seed gives each replica a stream of its own.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        strategy = tf.distribute.get_strategy()
        if self.top_k is not None and isinstance(strategy, tf.distribute.TPUStrategy):
            raise OptionError(
                "top_k needs each replica to know while tracing which one it is, but a TPU's "
                "replicas share one trace: leave top_k out to draw from the softmax over all "
                "slots."
            )
        self.placement = self.placement.of(StrategyReplicas(strategy))


class _Handler:
    def _report(self, result: CacheLossReturn, *, training: bool = True) -> None:
        if training:
            self._summarise(result)
        if tf.executing_eagerly():  # a traced tensor must not outlive its trace
            super()._report(result, training=training)

    def _summarise(self, result: CacheLossReturn) -> None:
        recording = tf.get_static_value(tf.convert_to_tensor(tf.summary.should_record_summaries()))
        if recording is None or recording:  # False unless the user set a default summary writer
            values = {
                **(result.metrics or {}),
                "interpretable_prediction_loss": result.interpretable_loss,  # the published two
                "staleness": result.staleness,
            }
            for name, value in values.items():
                tf.summary.scalar(f"cache/{name}", tf.reduce_mean(value))


class _FrontDoor:
    """Softmax cross-entropy of each query's item against all items in a cache.

    group: a tf.distribute.Strategy whose replicas share one cache in shards. Call the loss in
           `strategy.run`, with batches of one size, known when traced. None: no sharing

    >>> import tensorflow as tf, negcache_tensorflow as negcache
    >>> weights, x = tf.Variable(tf.ones((2, 4))), tf.eye(2)
    >>> item_network = lambda features: features["x"] @ weights
    >>> loss_fn = negcache.NegativeCacheLoss(8, {"x": x}, item_network({"x": x}))
    >>> with tf.GradientTape() as tape:
    ...     loss = loss_fn(item_network, x @ weights, x @ weights, {"x": x})
    >>> gradient = tape.gradient(loss, weights)
    """

    def __init__(self, *arguments: Any, group: Any = None, **options: Any) -> None:
        if group is not None and not isinstance(group, tf.distribute.Strategy):
            raise KindError(
                f"group is a {type(group).__name__}: expected a tf.distribute.Strategy, whose "
                "replicas share the cache, or None."
            )
        with contextlib.nullcontext() if group is None else group.scope():
            super().__init__(*arguments, group=group, **options)


BOUND = bind(
    TENSORFLOW,
    "negcache_tensorflow",
    module=tf.Module,
    store=VariableStore,
    mixins={
        "DistributedCacheClassificationLoss": _DistributedLoss,
        "CacheLossHandler": _Handler,
        "MultiCacheLossHandler": _Handler,
        "NegativeCacheLoss": _FrontDoor,
    },
)
globals().update(BOUND._asdict())  # the names match _bound.pyi
