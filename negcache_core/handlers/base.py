"""What handlers of one or several caches share: their parts, their state, and saving it.

Longer than most files, because it documents the methods that users call.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Self

from negcache_core.arrays._array import Array
from negcache_core.arrays.backend import NUMPY, Backend
from negcache_core.arrays.validation import (
    check_field_names,
    check_flag,
    check_mapping,
)
from negcache_core.cache.manager import CacheManager
from negcache_core.cache.row_checks import CheckedRows
from negcache_core.cache.state import NegativeCache
from negcache_core.errors import NegcacheError, OptionError
from negcache_core.handlers import checkpoint, upkeep
from negcache_core.handlers.diagnosis import (
    describe,
    diagnose,
    tell_of_nothing_learned,
    warn_of_harm,
)
from negcache_core.handlers.new_items import check_batch, stand_in
from negcache_core.handlers.setup import (
    NewItemsFilter,
    Setup,
    check_parts,
    check_sharing,
    named_by_loss,
)
from negcache_core.handlers.step import (
    ItemNetwork,
    check_result,
    commit,
    evaluate,
    run_step,
    to_differentiate,
)
from negcache_core.handlers.store import Store
from negcache_core.losses.results import CacheLossReturn
from negcache_core.retrieval.result import Retrieval
from negcache_core.sharding.mirrored import Mirrored


class BaseHandler:
    """Holds caches and a loss; see CacheLossHandler for the arguments.

    An adapter supplies `make_store`: a Setup -> the Store of its caches, empty.
    """

    backend: ClassVar[Backend] = NUMPY
    _store: Store
    update_cache_and_compute_loss: Callable[..., Any]

    def __init__(
        self,
        cache_managers: Mapping[str, CacheManager],
        cache_loss: Callable[..., CacheLossReturn],
        embedding_key: str | None = None,
        data_keys: Iterable[str] | None = None,
        use_cross_replica: bool = False,
        *,
        new_items_filter: NewItemsFilter | None = None,
        group: Any = None,
    ) -> None:
        super().__init__()
        embedding_key, keys = check_field_names(
            named_by_loss(embedding_key, cache_loss, "embedding_key"),
            named_by_loss(data_keys, cache_loss, "data_keys"),
        )
        check_parts(cache_managers, cache_loss, embedding_key, keys, new_items_filter, self.backend)
        self.embedding_key, self.data_keys = embedding_key, keys
        self.cache_loss: Any = cache_loss
        self.use_cross_replica = check_flag(use_cross_replica, "use_cross_replica")
        self.new_items_filter = new_items_filter
        self.group = group
        self._managers = {
            name: cache_managers[name].storing(embedding_key) for name in sorted(cache_managers)
        }
        check_sharing(
            self._managers,
            cache_loss,
            group,
            use_cross_replica=self.use_cross_replica,
            filters=new_items_filter is not None,
        )
        self._hold(self.make_store(self._setup))
        self.metrics: dict[str, Any] = {}
        self._steps, self._warned, self._told = 0, False, False

    @staticmethod
    def make_store(setup: Setup) -> Store:
        """Return the store of a new handler."""
        return Store(setup.init_caches())

    @classmethod
    def over(cls, parts: "BaseHandler", loss: Any, store: Store) -> Self:
        """Return a handler of another's parts, with its own loss and store."""
        handler = cls.__new__(cls)
        vars(handler).update(vars(parts), cache_loss=loss)
        handler._hold(store)
        return handler

    def _hold(self, store: Store) -> None:
        # No framework may treat it as a part of the module: it decides itself what is tracked.
        object.__setattr__(self, "_store", store)
        store.attach(self)

    @property
    def _setup(self) -> Setup:
        """The handler's parts, as they are now."""
        mirrored = Mirrored(self.group, self.backend) if self.use_cross_replica else None
        return Setup(
            self._managers,
            self.cache_loss,
            self.embedding_key,
            self.data_keys,
            self.new_items_filter,
            mirrored,
            self._report,
            self.backend,
        )

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Run one step; see `update_cache_and_compute_loss`."""
        return self.update_cache_and_compute_loss(*arguments, **options)

    @property
    def in_training(self) -> bool:
        """Whether a step learns where the call does not say so: an adapter's modules know."""
        return True

    def _report(self, result: CacheLossReturn, *, training: bool = True) -> None:
        """Keep a step's metrics, or those of an evaluation called like a step, for the user."""
        stop, metrics = self.backend.stop_gradient, result.metrics or {}
        self.metrics = {key: stop(value) for key, value in metrics.items()}
        if training and not self._warned and self.backend.eager():
            self._steps += 1
            self._warned = warn_of_harm(self._steps, self.metrics)

    def __repr__(self) -> str:
        try:
            caches = self._store.read()
        except NegcacheError:  # a handler of JAX holds none
            caches = None
        return describe(type(self).__name__, self._setup, caches, self.metrics)

    def diagnose(self, metrics: Mapping[str, Any] | None = None) -> list[str]:
        """Return what the metrics say about the training: sentences, each with its figure.

        metrics: those of a step; by default the last one's

        It reads values, and so waits for the device. JAX: `handler.diagnose(state, metrics)`.
        """
        known = self.metrics if metrics is None else check_mapping(metrics, "metrics")
        return diagnose(self._setup, self._store.read(), known)

    def compute_loss(
        self,
        query_embeddings: Array,
        pos_item_embeddings: Array,
        neg_item_embeddings: Array,
        retrieval: Retrieval,
        **options: Any,
    ) -> CacheLossReturn:
        """Return the loss, from embeddings of what was retrieved: the second of the three phases.

        neg_item_embeddings: (B * S, D), the item network's output for `retrieval.features`
        retrieval:           what `retrieve` returned
        options:             hard_negative_embeddings, hard_negative_features, competing_scores,
                             sample_weight, constant: see CacheClassificationLoss
        """
        setup = self._setup
        result = setup.phased_loss().loss_from_negatives(
            query_embeddings, pos_item_embeddings, neg_item_embeddings, retrieval, **options
        )
        return setup.weighted(result, query_embeddings)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write rows, ages and the state of the draws to a safetensors file.

        path: a file name, str or path

        Saving is atomic: whenever the process dies, `path` is either the old file or the new one,
        whole. Trained parameters, such as a scale, belong to the model and are not saved. Every
        library can read the rows that another wrote. Where replicas hold equal caches, let one of
        them save.

        JAX: `handler.save(state, path)`.

        Raises KindError if `path` is not a path, OSError where it cannot be written, and
        OptionError for a cache in shards: save that with the framework's own checkpoints, see
        docs/scaling.md.
        """
        checkpoint.save(self._setup, self._store, path)

    def load(
        self, path: str | os.PathLike[str], *, resize: bool = False, draws: bool = True
    ) -> None:
        """Restore what `save` wrote; training goes on as if it had never stopped.

        path:   a file that `save` wrote
        resize: let the file have another number of slots; see `restore`
        draws:  False: take only rows and ages, for a file that another library wrote

        JAX: `state = handler.load(state, path)`.

        Raises CheckpointError for a truncated or corrupted file, OptionError if its random state
        does not fit this handler, and all that `restore` raises. Any exception leaves the handler
        as it was.
        """
        checkpoint.load(self._setup, self._store, path, resize=resize, draws=draws)

    def restore(
        self, cache: NegativeCache | Mapping[str, NegativeCache], *, resize: bool = False
    ) -> None:
        """Copy the rows and ages of another cache: of another handler, run or library.

        cache:  a NegativeCache, or a dict of those by name for a MultiCacheLossHandler; it is
                copied
        resize: let it have another number of slots. If its rows do not all fit, the youngest stay,
                and of equal ages those that would have been overwritten last. Extra slots are
                empty.

        Rows whose embedding is not finite are left out: a NonFiniteWarning counts them. With
        max_staleness all rows compete at first.

        JAX: `state = handler.restore(state, cache)`.

        Raises KeysError, ShapeError, DTypeError or CapacityError unless fields, rows and number of
        slots are those of this handler, and OptionError for an age below 0 or a cache in shards.
        Any exception leaves the handler as it was.
        """
        checkpoint.restore(self._setup, self._store, cache, resize=resize)

    def resize(self, cache_size: int | Mapping[str, int]) -> None:
        """Change the number of slots; the state of the draws stays.

        cache_size: the new number of slots of all caches, or name -> number for some of them

        If the rows do not all fit, the youngest stay, and of equal ages those that would have been
        overwritten last. Extra slots are empty. `handler.cache_manager` becomes a copy with the new
        size, as others may share the old one. Optimizers hold nothing of a cache and need no
        change.

        JAX: `state = handler.resize(state, cache_size)`, outside of jit. The handler is then one
        for states of this size.

        TensorFlow's variables keep their shapes, so it raises OptionError there: `save`, and load
        into a new handler with `resize=True`.

        Raises KindError, CapacityError or KeysError for a size that cannot work, and OptionError
        for a cache in shards or in a traced function. Any exception leaves the handler as it was.
        """
        managers = checkpoint.resize(self._setup, self._store, cache_size)
        self._managers.update(managers)

    def reset(self) -> None:
        """Empty every slot, as in a new handler; the state of the draws stays.

        Use it at the start of another phase of training, when the towers have changed too much for
        the old rows to be of use.

        JAX: `state = handler.reset(state)`.
        """
        upkeep.reset(self._setup, self._store)
        self.metrics = {}

    def evict_nonfinite(self) -> Array:
        """Empty the slots whose embedding is not finite; return how many there were.

        No step writes such a row, and `load` and `restore` leave them out. Call this where a
        framework's own checkpoint may have brought in bad rows: a single one would make every loss
        NaN. These slots are the next to be filled. Nothing else changes, and no value is
        read.

        JAX: `state = handler.evict_nonfinite(state)`, with no count.
        """
        return checkpoint.evict_nonfinite(self._setup, self._store)

    def _step(
        self,
        item_network: ItemNetwork,
        query_embeddings: Array,
        pos_item_embeddings: Array,
        embeddings: Mapping[str, Array],
        features: Mapping[str, Mapping[str, Array]],
        training: bool | None,
        options: dict[str, Any],
    ) -> Array:
        if training is None:
            training = self.in_training and self.backend.differentiates()
            if self.in_training and not training and not self._told and self.backend.eager():
                self._told = True
                tell_of_nothing_learned(self._store.read())
        elif check_flag(training, "training") and not self.in_training:
            raise OptionError(
                "training=True was given to a handler in evaluation mode: call .train() on it, "
                "or on the module that contains it."
            )
        if not training:
            options.pop("noise", None)
            arguments = (item_network, query_embeddings, pos_item_embeddings, features, options)
            result = self._evaluate(*arguments)
            self._report(result, training=False)
            return to_differentiate(result)
        return run_step(
            self._setup,
            self._store,
            item_network,
            query_embeddings,
            pos_item_embeddings,
            embeddings,
            features,
            options,
        )

    def _retrieve(
        self,
        query_embeddings: Array,
        features: Mapping[str, Mapping[str, Array]],
        pos_item_embeddings: Array | None,
        options: Mapping[str, Any],
    ) -> Retrieval:
        setup, caches = self._setup, self._store.read()
        loss = setup.phased_loss()
        with loss.undone_on_error():
            return loss.retrieve(
                query_embeddings,
                caches,
                pos_features=self._stand_in(features),
                pos_doc_embeddings=pos_item_embeddings,
                **options,
            )

    def _evaluate(
        self,
        item_network: ItemNetwork | None,
        query_embeddings: Array,
        pos_item_embeddings: Array,
        features: Mapping[str, Mapping[str, Array]],
        options: Mapping[str, Any],
    ) -> CacheLossReturn:
        return evaluate(
            self._setup,
            self._store,
            item_network,
            query_embeddings,
            pos_item_embeddings,
            features,
            options,
        )

    def _commit(
        self,
        result: CacheLossReturn,
        embeddings: Mapping[str, Array],
        features: Mapping[str, Mapping[str, Array]],
    ) -> None:
        if not self.in_training:
            return
        setup, store = self._setup, self._store
        setup.backend.begin_step()
        new = check_batch(setup, store.read(), embeddings, features)
        commit(setup, store, check_result(result, self.backend), new)

    def _stand_in(self, features: Mapping[str, Mapping[str, Array]]) -> CheckedRows | None:
        return stand_in(self._setup, self._store.read(), features)
