"""Handlers for JAX: the state goes in and comes out, so that a step is a pure function."""

import copy
import math
import os
from typing import Any, NamedTuple, Self

import jax
from jax import Array
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from negcache_core import KindError, NegativeCache, OptionError
from negcache_core.arrays.validation import check_keys, check_mapping
from negcache_core.cache.restoring import check_layout
from negcache_core.handlers.cache_loss_handler import CacheLossHandler as _CacheLossHandler
from negcache_core.handlers.cache_loss_handler import (
    MultiCacheLossHandler as _MultiCacheLossHandler,
)
from negcache_core.handlers.step import BaseHandler
from negcache_core.losses.results import CacheLossReturn
from negcache_core.sharding.placement import check_equal_shards

from ._backend import JAX, KeyStream, check_key
from .losses import CacheClassificationLoss, DistributedCacheClassificationLoss

__all__ = ["CacheLossHandler", "HandlerState", "MultiCacheLossHandler"]


class HandlerState(NamedTuple):
    """All state of a handler, a pytree: caches by name, and the key of the next draw."""

    caches: dict[str, NegativeCache]
    key: Array


class _StateHandler(BaseHandler):
    """A handler without state of its own. Donate the state to jit, and no table is copied."""

    backend = JAX

    def init(self, key: Array) -> HandlerState:
        """Return the state of empty caches; `key` seeds all draws.

        A cache in shards is made whole. To make each shard on its own device, write
        `jax.jit(handler.init, out_shardings=handler.shardings(mesh))(key)`.
        """
        return HandlerState(self._init_caches(), check_key(key, "key"))

    def specs(self) -> HandlerState:
        """Return a PartitionSpec for each array of the state: `in_specs` and `out_specs`.

        Only for a handler whose cache is in shards: rows are cut along the loss's `group`, and the
        key is the same everywhere.
        """
        if not isinstance(self.cache_loss, DistributedCacheClassificationLoss):
            raise OptionError(
                "specs and shardings are for a cache in shards: this handler's loss is a "
                f"{type(self.cache_loss).__name__}. Use a DistributedCacheClassificationLoss."
            )
        rows = PartitionSpec(self.cache_loss.group)
        caches = {
            name: NegativeCache(dict.fromkeys(manager.specs, rows), rows)
            for name, manager in self._managers.items()
        }
        return HandlerState(caches, PartitionSpec())

    def shardings(self, mesh: Mesh) -> HandlerState:
        """Return where each array of the state lies on a mesh: for jax.device_put, jit and Orbax.

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
                f"the loss's group is {group!r}, and the mesh has axes {tuple(mesh.shape)}: name "
                "one of these, or several in a tuple."
            )
        count = math.prod(mesh.shape[axis] for axis in axes)
        check_equal_shards(self._managers, count, f"device along {group!r}")
        return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)

    def bind(self, state: HandlerState) -> Self:
        """Return this handler holding `state`, for the phases; `.state` is what became of it.

        Raises KeysError, CapacityError, ShapeError or DTypeError unless it is a state of this
        handler, and not of one with other fields or another capacity.
        """
        if not isinstance(state, HandlerState):
            raise KindError(
                f"state is a {type(state).__name__}: expected a HandlerState, as handler.init(key) "
                "makes. Give that to a checkpoint library as the target to restore."
            )
        caches = check_mapping(state.caches, "state.caches")
        check_keys(caches, self._managers, "the state", exact=True)
        if not isinstance(self.cache_loss, DistributedCacheClassificationLoss):
            own = jax.eval_shape(self._init_caches)
            for name, cache in own.items():
                check_layout(caches[name], cache, f"cache {name!r}")
        bound = copy.copy(self)
        bound._tables, bound._keys = state.caches, KeyStream(check_key(state.key, "state.key"))
        if isinstance(self.cache_loss, CacheClassificationLoss):
            bound.cache_loss = self.cache_loss.with_keys(bound._keys)
        return bound

    @property
    def state(self) -> HandlerState:
        """The state of a bound handler."""
        return HandlerState(self._tables, self._keys.key)

    def update_cache_and_compute_loss(
        self, state: HandlerState, *arguments: Any, **options: Any
    ) -> tuple[Array, HandlerState]:
        """Return the loss and the state after the step, fit for `value_and_grad(has_aux=True)`.

        The arguments after the state are those of `negcache_core`'s handler.
        """
        bound = self.bind(state)
        loss = super(_StateHandler, bound).update_cache_and_compute_loss(*arguments, **options)
        return loss, bound.state

    def refresh(self, state: HandlerState, *arguments: Any, **options: Any) -> HandlerState:
        """Return the state with its oldest rows embedded anew; see `negcache_core`'s handler."""
        bound = self.bind(state)
        super(_StateHandler, bound).refresh(*arguments, **options)
        return bound.state

    def prefill(self, state: HandlerState, *arguments: Any, **options: Any) -> HandlerState:
        """Return the state filled from a corpus; see `negcache_core`'s handler."""
        bound = self.bind(state)
        super(_StateHandler, bound).prefill(*arguments, **options)
        return bound.state

    def save(self, state: HandlerState, path: str | os.PathLike[str]) -> None:
        """Write the state to a safetensors file, atomically; see `negcache_core`'s handler."""
        super(_StateHandler, self.bind(state)).save(path)

    def load(
        self, state: HandlerState, path: str | os.PathLike[str], **options: bool
    ) -> HandlerState:
        """Return what `save` wrote, where `state` lies; see `negcache_core`'s handler."""
        bound = self.bind(state)
        super(_StateHandler, bound).load(path, **options)
        return bound.state

    def restore(self, state: HandlerState, *arguments: Any, **options: bool) -> HandlerState:
        """Return the state with the rows and ages of a cache; see `negcache_core`'s handler."""
        bound = self.bind(state)
        super(_StateHandler, bound).restore(*arguments, **options)
        return bound.state

    def evict_nonfinite(self, state: HandlerState) -> HandlerState:
        """Return the state without rows that are not finite; see `negcache_core`'s handler."""
        bound = self.bind(state)
        super(_StateHandler, bound).evict_nonfinite()
        return bound.state

    def _generators(self) -> list[KeyStream]:
        return [self._keys]

    def _init_caches(self) -> dict[str, NegativeCache]:
        return {name: manager.init_cache() for name, manager in self._managers.items()}

    def _hold(self) -> None:
        self._tables: dict[str, NegativeCache] = {}

    def _keep(self, caches: dict[str, NegativeCache]) -> None:
        self._tables = caches

    def _caches(self) -> dict[str, NegativeCache]:
        if not self._tables:
            raise KindError(
                "this handler holds no state: bind one to it, bound = handler.bind(state), and "
                "take bound.state afterwards."
            )
        return self._tables

    def _report(self, result: CacheLossReturn) -> None:
        """Keep nothing: a traced array must not outlive its trace. Use the phases for metrics."""


class CacheLossHandler(_StateHandler, _CacheLossHandler):
    """One cache and its step; see `negcache_core.CacheLossHandler`."""


class MultiCacheLossHandler(_StateHandler, _MultiCacheLossHandler):
    """Several caches that count as one; see `negcache_core.MultiCacheLossHandler`."""
