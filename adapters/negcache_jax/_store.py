"""Where a cache's state lives in JAX: in a pytree that each call takes and returns."""

from typing import Any, NamedTuple, Self

from negcache_core import KindError, NegativeCache
from negcache_core.adapter import Caches, Setup, Store

from ._backend import KeyStream


class HandlerState(NamedTuple):
    """All state of a handler, a pytree: it goes into each call and comes out of it.

    caches: name -> NegativeCache; a single cache has the name "cache"
    key:    a key of jax.random, for the next draw
    window: with max_staleness the state of the window of ages; else None
    """

    caches: dict[str, NegativeCache]
    key: Any
    window: Any = None


class NoStore(Store):
    """The store of a handler without a bound state."""

    @classmethod
    def of(cls, setup: Setup) -> Self:
        """Return it for any handler: the state is explicit."""
        del setup
        return cls(Caches({}))

    def read(self) -> Caches:
        """Raise KindError."""
        raise KindError(
            "this handler holds no state: bind one with bound = handler.bind(state), and read "
            "bound.state afterwards."
        )


class TreeStore(Store):
    """A bound state; `keys` are for its draws."""

    def __init__(self, state: HandlerState, keys: KeyStream) -> None:
        caches = {name: state.caches[name] for name in sorted(state.caches)}
        super().__init__(Caches(caches, state.window))
        self.keys = keys

    def state(self) -> HandlerState:
        """Return the current state."""
        caches = self.read()
        return HandlerState(dict(caches), self.keys.key, caches.window)

    def generators(self, loss: Any) -> list[Any]:
        """Return the single stream that all draws come from."""
        del loss
        return [self.keys]
