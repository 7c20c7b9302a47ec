"""Handlers in JAX: they have no state; it is an argument and a result."""

import math
import os
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
from jax import Array
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from negcache_core import CacheLossReturn, KindError, NegativeCache, OptionError
from negcache_core.adapter import Setup
from negcache_core.arrays.validation import check_keys, check_mapping
from negcache_core.cache.restoring import check_layout
from negcache_core.retrieval.placement import HERE
from negcache_core.sharding.placement import check_equal_shards

from ._backend import KeyStream, check_key
from ._loss import KeyedLoss
from ._store import HandlerState, TreeStore


class Silent:
    """A handler that keeps no metrics: a traced array must not outlive its trace.

    Use the phases for metrics.
    """

    def _report(self, result: CacheLossReturn, *, training: bool = True) -> None:
        """Keep nothing."""


class Holding(Silent):
    """A handler that holds a state, as `bind` returns it: it has the core's methods."""

    _store: TreeStore

    @property
    def state(self) -> HandlerState:
        """What became of the state."""
        return self._store.state()


class StateHandler(Silent):
    """A handler without state of its own. Donate the state to jit, and no table is copied."""

    _setup: Setup
    _managers: Mapping[str, Any]
    cache_loss: Any
    holding: ClassVar[type[Any]]

    def init(self, key: Array) -> HandlerState:
        """Return a state of empty caches.

        key: a key of jax.random, from which all draws come

        A cache in shards is made whole. To make each shard on its own device, write
        `jax.jit(handler.init, out_shardings=handler.shardings(mesh))(key)`.
        """
        caches = self._setup.init_caches(HERE)
        return HandlerState(dict(caches), check_key(key, "key"), caches.window)

    def specs(self) -> HandlerState:
        """Return a PartitionSpec for each array of the state.

        Give them to `shard_map` as `in_specs` and `out_specs`. Rows are cut along the loss's
        `group`; the key is the same everywhere. Raises OptionError unless the cache is in shards.
        """
        if not self._setup.placement.sharded:
            raise OptionError(
                "specs and shardings are for a sharded cache: this handler's loss is a "
                f"{type(self.cache_loss).__name__}. Use a DistributedCacheClassificationLoss."
            )
        rows = PartitionSpec(self.cache_loss.group)
        caches = {
            name: NegativeCache(dict.fromkeys(manager.specs, rows), rows)
            for name, manager in self._managers.items()
        }
        same = PartitionSpec()
        return HandlerState(caches, same, same if self._setup.windowed else None)

    def shardings(self, mesh: Mesh) -> HandlerState:
        """Return where each array of the state lies on a mesh: for jax.device_put, jit and Orbax.

        mesh: a jax.sharding.Mesh with the axes of the loss's `group`

        Raises OptionError if the mesh lacks the axis, CapacityError if the number of devices along
        it does not divide a cache_size.
        """
        specs = self.specs()
        if not isinstance(mesh, (Mesh, AbstractMesh)):
            raise KindError(f"mesh is a {type(mesh).__name__}: expected a jax.sharding.Mesh.")
        group = self.cache_loss.group
        axes = (group,) if isinstance(group, str) else tuple(group)
        missing = [axis for axis in axes if axis not in mesh.shape]
        if missing:
            raise OptionError(
                f"the loss's group is {group!r}, but the mesh has axes {tuple(mesh.shape)}: name "
                "one of these, or several in a tuple."
            )
        count = math.prod(mesh.shape[axis] for axis in axes)
        check_equal_shards(self._managers, count, f"device along {group!r}")
        return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)

    def bind(self, state: HandlerState) -> Any:
        """Return a handler that holds `state`; its `.state` is the state as it is now.

        Use it for the three phases, which are its methods, for `plot_cache`, and for the `cache`
        itself. Bind inside of a jitted function, and return `.state` from it.

        Raises KeysError, CapacityError, ShapeError or DTypeError unless it is a state of this
        handler, with its fields and its number of slots.
        """
        if not isinstance(state, HandlerState):
            raise KindError(
                f"state is a {type(state).__name__}: expected a HandlerState, as made by "
                "handler.init(key). Pass that to a checkpoint library as the restore target."
            )
        caches = check_mapping(state.caches, "state.caches")
        check_keys(caches, self._managers, "the state", exact=True)
        windowed = self._setup.windowed
        if windowed != (state.window is not None):
            has, wants = ("none", "one") if windowed else ("a window", "none")
            raise OptionError(
                f"state.window is {has} but the loss, with "
                f"max_staleness={getattr(self.cache_loss, 'max_staleness', None)}, needs "
                f"{wants}: make a state with this handler's init, and put the rows into it with "
                "handler.restore."
            )
        if not self._setup.placement.sharded:
            own = jax.eval_shape(lambda: dict(self._setup.init_caches(HERE)))
            for name, cache in own.items():
                check_layout(caches[name], cache, f"cache {name!r}")
        keys, loss = KeyStream(check_key(state.key, "state.key")), self.cache_loss
        if isinstance(loss, KeyedLoss):
            loss = loss.with_keys(keys)
        return self.holding.over(self, loss, TreeStore(state, keys))

    def update_cache_and_compute_loss(
        self, state: HandlerState, *arguments: Any, **options: Any
    ) -> tuple[Array, HandlerState]:
        """Run one training step: return the loss and the new state.

        Fit for `jax.value_and_grad(…, has_aux=True)`. Donate the state to `jit`, so that no table
        is copied.
        """
        bound = self.bind(state)
        loss = bound.update_cache_and_compute_loss(*arguments, **options)
        return loss, bound.state

    def __call__(
        self, state: HandlerState, *arguments: Any, **options: Any
    ) -> tuple[Array, HandlerState]:
        """Return the loss and the new state; see `update_cache_and_compute_loss`."""
        return self.update_cache_and_compute_loss(state, *arguments, **options)

    def evaluate(self, state: HandlerState, *arguments: Any, **options: Any) -> CacheLossReturn:
        """Return the loss against the cache as it is: nothing is drawn, written or aged."""
        return self.bind(state).evaluate(*arguments, **options)

    def refresh(self, state: HandlerState, *arguments: Any, **options: Any) -> HandlerState:
        """Return the state with its n oldest rows embedded again."""
        return self._after("refresh", state, *arguments, **options)

    def prefill(self, state: HandlerState, *arguments: Any, **options: Any) -> HandlerState:
        """Return the state with its cache filled from a corpus."""
        return self._after("prefill", state, *arguments, **options)

    def save(self, state: HandlerState, path: str | os.PathLike[str]) -> None:
        """Write the state to a safetensors file: rows, ages and the key."""
        self.bind(state).save(path)

    def load(
        self, state: HandlerState, path: str | os.PathLike[str], **options: bool
    ) -> HandlerState:
        """Return the state that `save` wrote, placed where `state` lies."""
        return self._after("load", state, path, **options)

    def restore(self, state: HandlerState, *arguments: Any, **options: bool) -> HandlerState:
        """Return the state with the rows and ages of another cache."""
        return self._after("restore", state, *arguments, **options)

    def resize(self, state: HandlerState, cache_size: int | Mapping[str, int]) -> HandlerState:
        """Return the state with another number of slots. Call it outside of jit.

        The handler is then one for states of this size.
        """
        return self._after("resize", state, cache_size)

    def reset(self, state: HandlerState) -> HandlerState:
        """Return the state with every slot empty."""
        return self._after("reset", state)

    def evict_nonfinite(self, state: HandlerState) -> HandlerState:
        """Return the state without the rows whose embedding is not finite."""
        return self._after("evict_nonfinite", state)

    def diagnose(self, state: HandlerState, metrics: Mapping[str, Any] | None = None) -> list[str]:
        """Return what a state and metrics say about the training: sentences, each with its figure.

        metrics: those of a `CacheLossReturn`, as a handler without state keeps none
        """
        return self.bind(state).diagnose(metrics)

    def _after(self, name: str, state: HandlerState, *arguments: Any, **options: Any) -> Any:
        """Return the state after a method of the core's handler ran."""
        bound = self.bind(state)
        getattr(bound, name)(*arguments, **options)
        return bound.state
