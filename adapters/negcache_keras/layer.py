"""CacheLayer: runs a handler's step in `compute_loss`, shows its metrics, saves its state."""

import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np

from negcache_core import CacheLossReturn, CheckpointError, KeysError, KindError, OptionError
from negcache_core.handlers import CacheLossHandler, MultiCacheLossHandler
from negcache_core.handlers.new_items import with_labels
from negcache_core.losses import CacheClassificationLoss
from negcache_core.losses.network import embedded_by

from ._chosen import HOST
from ._host import Host, refuse

_STATE = "negative_cache"  # the key of the handler's state in a layer's saved variables
SHOWN = ("effective_negatives", "staleness", "fill")


class CacheLayer(keras.layers.Layer):
    """A cache as part of a Keras model: `fit` shows its metrics, model files hold its state.

    handler: a `NegativeCacheLoss`, or another CacheLossHandler from the adapter for Keras's backend
             whose loss is a CacheClassificationLoss
    shown:   the metrics that `fit` shows and History records, as `cache_fill`, …, averaged over
             an epoch's steps: see `negcache_core.losses.metrics.step_metrics`
    name:    the layer's name, which is also the prefix of these metrics

    Create it in the model's `__init__` as an attribute, and call its `compute_loss` in the model's
    own. `save_weights` and `save`, and so `ModelCheckpoint` and `BackupAndRestore`, then save rows,
    ages and the random generator, as `handler.save` does. A resumed training matches an
    uninterrupted one bit for bit, whatever the fields' dtypes. Loading raises the errors of
    `handler.load`, inside Keras's own ValueError. From a file of another backend, rows and ages
    are loaded; draws continue from the handler's own generator, and a warning says so.

    `layer.handler` has the methods of `negcache_core.CacheLossHandler`, such as `prefill`, on
    every backend. It holds its own state, in JAX too.

    Raises KindError or OptionError for any other handler, on a Keras backend without gradients,
    for several replicas in TensorFlow, and for several processes. For the last two see
    docs/scaling.md.

    >>> import keras, numpy as np
    >>> from negcache_keras import CacheLayer, NegativeCacheLoss
    >>> class TwoTower(keras.Model):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.tower = keras.layers.Dense(2)
    ...         item = {"x": np.zeros((1, 2), "float32")}  # an example batch
    ...         self.cache = CacheLayer(NegativeCacheLoss(4, item, embedding=2))
    ...     def call(self, x):
    ...         return self.tower(x["query"]), self.tower(x["item"])
    ...     def compute_loss(self, x, y, y_pred, sample_weight=None, training=True):
    ...         return self.cache.compute_loss(
    ...             lambda features: self.tower(features["x"]), *y_pred, {"x": x["item"]},
    ...             training=training)
    >>> model = TwoTower()
    >>> model.compile("adam")
    >>> x = {"query": np.eye(2), "item": np.eye(2)}
    >>> sorted(model.fit(x, verbose=0).history)
    ['cache_effective_negatives', 'cache_fill', 'cache_staleness', 'loss']
    """

    handler: CacheLossHandler

    def __init__(
        self, handler: CacheLossHandler, shown: Iterable[str] = SHOWN, *, name: str = "cache"
    ) -> None:
        self._host = _host()
        _check(handler, self._host)
        _check_place_to_make()
        super().__init__(name=name)
        self._host.attach(self, self._host.adopt(handler))
        self.means = {each: keras.metrics.Mean(name=f"{name}_{each}") for each in shown}
        self.built = True  # the handler has created its variables
        self._refusal: Exception | None = None

    @property
    def variables(self) -> list[Any]:
        """The layer's state in Keras variables; it includes the cache only in JAX.

        They are not `weights`: on every backend `get_weights`, and so EarlyStopping's best weights,
        leave out the cache.
        """
        own: list[Any] = super().variables
        return own + self._host.variables(self.handler)

    def compute_loss(
        self,
        item_network: Callable[[Mapping[str, Any]], Any],
        query_embeddings: Any,
        pos_item_embeddings: Any,
        features: Mapping[str, Any],
        *,
        labels: Mapping[str, Any] | None = None,
        training: bool = True,
        positive_ids: Any = None,
        **options: Any,
    ) -> Any:
        """Return the loss of a batch; in training, update the cache.

        labels:   fields that the item network does not take; features may contain them instead
        training: False, as in `evaluate`, gives the loss against the current cache. Rows are drawn
                  and embedded for the metrics only; rows, ages and later draws do not change.
        options:  hard_negative_embeddings, hard_negative_features, competing_scores,
                  sample_weight, constant: see CacheClassificationLoss

        The other arguments are those of `handler.update_cache_and_compute_loss`. Call it once per
        training step: a second call is a second step of the cache, and the items that the first
        call wrote are among its negatives. Raises KeysError if `shown` has a name that is not a
        metric of the loss, OptionError if several replicas use the layer or the distribution has
        changed since it was created, and whatever the handler raises.
        """
        self._host.check_placement()
        handler = self.handler
        batch = (query_embeddings, pos_item_embeddings, with_labels(features, labels))
        if training:
            result = self._step(item_network, *batch, positive_ids, options)
        else:
            result = handler.evaluate(item_network, *batch, positive_ids=positive_ids, **options)
            self._check_shown(result)
        metrics: Mapping[str, Any] = result.metrics or {}
        for name, mean in self.means.items():
            mean.update_state(metrics[name])
        return result.loss

    def _step(
        self,
        item_network: Callable[[Mapping[str, Any]], Any],
        query_embeddings: Any,
        pos_item_embeddings: Any,
        features: Mapping[str, Any],
        positive_ids: Any,
        options: Mapping[str, Any],
    ) -> CacheLossReturn:
        """Run the phases of a step; write nothing if a name in `shown` is wrong."""
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
            with self._host.quiet():
                handler.commit(result, pos_item_embeddings, features)
        return result

    def _check_shown(self, result: CacheLossReturn) -> None:
        known = result.metrics or {}
        missing = [name for name in self.means if name not in known]
        if missing:
            raise KeysError(f"shown has {missing}: expected names among {sorted(known)}.")

    def save_own_variables(self, store: Any) -> None:
        """Put the handler's file into `store` as bytes: HDF5 has no bfloat16 and no text."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, _STATE)
            self.handler.save(path)
            store[_STATE] = np.fromfile(path, np.uint8)

    def load_own_variables(self, store: Any) -> None:
        """Load the handler's state from `store`, all of it or nothing."""
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
                _load(self.handler, path)
            except Exception as error:
                self._refusal = error
                raise


def _load(handler: CacheLossHandler, path: Path) -> None:
    """Load a file; if another backend saved it, only rows and ages, since its draws differ."""
    try:
        handler.load(path)
    except OptionError:
        handler.load(path, draws=False)  # raises again if the draws were not the reason
        warnings.warn(
            "the file's cache was saved by another backend of Keras: its rows and ages are loaded, "
            "and the draws go on from this layer's own seed.",
            stacklevel=2,
        )


def _host() -> Host:
    if HOST is None:
        raise refuse()
    return HOST


def _check(handler: Any, host: Host) -> None:
    backend = keras.config.backend()
    if isinstance(handler, MultiCacheLossHandler) or not isinstance(handler, CacheLossHandler):
        raise KindError(
            f"handler is a {type(handler).__name__}: expected a NegativeCacheLoss, or another "
            f"CacheLossHandler of {host.package}."
        )
    if handler.backend.name != backend:
        raise KindError(
            f"the handler is one for {handler.backend.name}, and Keras runs on {backend}: take "
            "negcache_keras.NegativeCacheLoss, which is for the backend that Keras runs on, or set "
            "KERAS_BACKEND before Keras is imported."
        )
    if not isinstance(handler.cache_loss, CacheClassificationLoss):
        raise KindError(
            f"the handler's loss is a {type(handler.cache_loss).__name__}: expected a "
            "CacheClassificationLoss, which has phases and metrics."
        )
    if handler.cache_loss.placement.sharded:
        raise OptionError(
            "the handler's cache is in shards, whose state Keras's files cannot hold: write the "
            "training loop as docs/scaling.md shows."
        )
    host.check_placement()


def _check_place_to_make() -> None:
    """Raise while Keras infers shapes: it discards what is created meanwhile."""
    try:
        keras.Variable(np.zeros(()), trainable=False)
    except ValueError as error:
        raise OptionError(
            "the layer is made while Keras finds out shapes, as in a build() that fit calls: make "
            "it in the model's __init__."
        ) from error
