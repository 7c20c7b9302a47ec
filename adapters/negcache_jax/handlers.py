"""Handlers for JAX: the state goes in and comes out, so that a step is a pure function."""

import copy
from typing import Any, NamedTuple, Self

from jax import Array

from negcache_core import NegativeCache
from negcache_core.handlers import BaseHandler
from negcache_core.handlers import CacheLossHandler as _CacheLossHandler
from negcache_core.handlers import MultiCacheLossHandler as _MultiCacheLossHandler
from negcache_core.results import CacheLossReturn

from ._backend import JAX, KeyStream
from .losses import CacheClassificationLoss

__all__ = ["CacheLossHandler", "HandlerState", "MultiCacheLossHandler"]


class HandlerState(NamedTuple):
    """All state of a handler, a pytree: caches by name, and the key of the next draw."""

    caches: dict[str, NegativeCache]
    key: Array


class _StateHandler(BaseHandler):
    """A handler without state of its own. Donate the state to jit, and no table is copied."""

    backend = JAX

    def init(self, key: Array) -> HandlerState:
        """Return the state of empty caches; `key` seeds all draws."""
        return HandlerState(self._init_caches(), key)

    def bind(self, state: HandlerState) -> Self:
        """Return this handler holding `state`, for the phases; `.state` is what became of it."""
        bound = copy.copy(self)
        bound._tables, bound._keys = state.caches, KeyStream(state.key)
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

    def _hold(self) -> None:
        self._tables: dict[str, NegativeCache] = {}

    def _keep(self, caches: dict[str, NegativeCache]) -> None:
        self._tables = caches

    def _report(self, result: CacheLossReturn) -> None:
        """Keep nothing: a traced array must not outlive its trace. Use the phases for metrics."""


class CacheLossHandler(_StateHandler, _CacheLossHandler):
    """One cache and its step; see `negcache_core.CacheLossHandler`."""


class MultiCacheLossHandler(_StateHandler, _MultiCacheLossHandler):
    """Several caches that count as one; see `negcache_core.MultiCacheLossHandler`."""
