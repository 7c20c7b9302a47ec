"""The layer: a handler's step for `compute_loss`, its figures for `fit`, its state for files."""

import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from negcache_tensorflow import (
    CacheClassificationLoss,
    CacheLossHandler,
    CacheLossReturn,
    CheckpointError,
    DistributedCacheClassificationLoss,
    KeysError,
    KindError,
    OptionError,
)

from negcache_core.handlers.new_items import with_labels
from negcache_core.losses.network import embedded_by

_STATE = "negative_cache"  # under which a layer's variables in a file have the handler's state
SHOWN = ("effective_negatives", "staleness", "fill")


class CacheLayer(keras.layers.Layer):
    """A cache that is part of a Keras model: `fit` shows its figures, every file has its state.

    handler: a `negcache_tensorflow.NegativeCacheLoss`, or another CacheLossHandler whose loss is a
             CacheClassificationLoss
    shown:   which of its metrics `fit` shows and History has, as `cache_fill`, …: averages over
             an epoch's steps, see `negcache_core.losses.metrics.step_metrics`
    name:    of the layer, and what these names begin with

    Make it an attribute of the model, and call `compute_loss` in the model's own. `save_weights`,
    `save`, and so `ModelCheckpoint` and `BackupAndRestore`, then keep rows, ages and the state of
    the draws, as `handler.save` does: whatever dtypes the fields have, training goes on bit for
    bit. Loading raises what `handler.load` raises, inside of Keras's own ValueError.

    Raises KindError or OptionError for another handler, where Keras runs on another backend than
    TensorFlow, and for a strategy of several replicas: see docs/scaling.md for these.

    >>> import negcache_tensorflow as negcache
    >>> specs = {"x": negcache.FieldSpec((2,), "float32"), "e": negcache.FieldSpec((2,), "float32")}
    >>> handler = negcache.CacheLossHandler(
    ...     negcache.CacheManager(specs, cache_size=4),
    ...     negcache.CacheClassificationLoss("e", ("x",)), embedding_key="e", data_keys=("x",))
    >>> class TwoTower(keras.Model):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.tower, self.cache = keras.layers.Dense(2), CacheLayer(handler)
    ...     def call(self, x):
    ...         return self.tower(x["query"]), self.tower(x["item"])
    ...     def compute_loss(self, x, y, y_pred, sample_weight=None, training=True):
    ...         return self.cache.compute_loss(
    ...             lambda features: self.tower(features["x"]), *y_pred, {"x": x["item"]},
    ...             training=training)
    >>> model = TwoTower()
    >>> model.compile("adam")
    >>> x = {"query": tf.eye(2), "item": tf.eye(2)}
    >>> sorted(model.fit(x, verbose=0).history)
    ['cache_effective_negatives', 'cache_fill', 'cache_staleness', 'loss']
    """

    def __init__(
        self, handler: CacheLossHandler, shown: Iterable[str] = SHOWN, *, name: str = "cache"
    ) -> None:
        _check(handler)
        super().__init__(name=name)
        self.handler = handler
        self.means = {each: keras.metrics.Mean(name=f"{name}_{each}") for each in shown}
        self.built = True  # the handler has its variables
        self._refusal: Exception | None = None

    def compute_loss(
        self,
        item_network: Callable[[Mapping[str, tf.Tensor]], tf.Tensor],
        query_embeddings: tf.Tensor,
        pos_item_embeddings: tf.Tensor,
        features: Mapping[str, tf.Tensor],
        *,
        labels: Mapping[str, tf.Tensor] | None = None,
        training: bool = True,
        positive_ids: tf.Tensor | None = None,
        **options: Any,
    ) -> tf.Tensor:
        """Return the loss of a batch; in training update the cache.

        labels:   fields that the item network does not take; they may as well be among the features
        training: False, as in `evaluate`: the loss against the cache as it is. Rows are drawn and
                  embedded for the figures alone; rows, ages and the draws to come stay the same.
        options:  hard_negative_embeddings, hard_negative_features, competing_scores,
                  sample_weight, constant: see CacheClassificationLoss

        The other arguments are those of `handler.update_cache_and_compute_loss`. Raises KeysError
        for a name in `shown` that is no metric of the loss, and what the handler raises.
        """
        handler = self.handler
        batch = (query_embeddings, pos_item_embeddings, with_labels(features, labels))
        if training:
            result = self._step(item_network, *batch, positive_ids, options)
        else:
            result = handler.evaluate(item_network, *batch, positive_ids=positive_ids, **options)
            self._check_shown(result)
        for name, mean in self.means.items():
            mean.update_state(result.metrics[name])
        return result.loss

    def _step(
        self,
        item_network: Callable[[Mapping[str, tf.Tensor]], tf.Tensor],
        query_embeddings: tf.Tensor,
        pos_item_embeddings: tf.Tensor,
        features: Mapping[str, tf.Tensor],
        positive_ids: tf.Tensor | None,
        options: Mapping[str, Any],
    ) -> CacheLossReturn:
        """Run a step by its phases; nothing is written if a name in `shown` is wrong."""
        handler = self.handler
        with handler.cache_loss.undone_on_error():
            found = handler.retrieve(
                query_embeddings,
                features,
                positive_ids=positive_ids,
                pos_item_embeddings=pos_item_embeddings,
            )
            result = handler.compute_loss(
                query_embeddings,
                pos_item_embeddings,
                embedded_by(item_network, found.features),
                found,
                **options,
            )
            self._check_shown(result)
            # Keras writes the figures. What a graph writes has one step for ever, and XLA has no
            # summaries at all.
            with tf.summary.record_if(False):  # noqa: FBT003 - TensorFlow's own signature
                handler.commit(result, pos_item_embeddings, features)
        return result

    def _check_shown(self, result: CacheLossReturn) -> None:
        missing = [name for name in self.means if name not in result.metrics]
        if missing:
            raise KeysError(f"shown has {missing}: expected names among {sorted(result.metrics)}.")

    def save_own_variables(self, store: Any) -> None:
        """Put the handler's file into `store` as bytes: HDF5 has no bfloat16, and no text."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, _STATE)
            self.handler.save(path)
            store[_STATE] = np.fromfile(path, np.uint8)

    def load_own_variables(self, store: Any) -> None:
        """Take the handler's state out of `store`; all or nothing of it."""
        refusal, self._refusal = self._refusal, None
        if _STATE not in store.keys():  # noqa: SIM118 - not every store of Keras is a mapping
            # After a refusal Keras looks for the layer elsewhere, and reports the last error.
            raise refusal or CheckpointError(
                "the file has no negative cache: it was saved by a model without this layer. "
                "load_weights(…, skip_mismatch=True) loads the rest, and the cache starts empty."
            )
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, _STATE)
            np.asarray(store[_STATE]).tofile(path)
            try:
                self.handler.load(path)
            except Exception as error:
                self._refusal = error
                raise


def _check(handler: Any) -> None:
    if keras.config.backend() != "tensorflow":
        raise OptionError(
            f"Keras runs on {keras.config.backend()}, and a CacheLayer needs TensorFlow: set "
            "KERAS_BACKEND=tensorflow before Keras is imported."
        )
    if not isinstance(handler, CacheLossHandler):
        raise KindError(
            f"handler is a {type(handler).__name__}: expected negcache_tensorflow.CacheLossHandler."
        )
    if not isinstance(
        handler.cache_loss, CacheClassificationLoss | DistributedCacheClassificationLoss
    ):
        raise KindError(
            f"the handler's loss is a {type(handler.cache_loss).__name__}: expected a "
            "CacheClassificationLoss, which has phases and metrics."
        )
    replicas = tf.distribute.get_strategy().num_replicas_in_sync
    if isinstance(handler.cache_loss, DistributedCacheClassificationLoss) or replicas > 1:
        raise OptionError(
            "the handler's cache is on several replicas, whose state Keras's files cannot hold: "
            "write the training loop as docs/scaling.md shows."
        )
