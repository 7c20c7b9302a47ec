"""Where a handler's caches are kept. An adapter brings its own: tensors, variables or a pytree."""

from typing import Any

from negcache_core.cache.named import Caches


class Store:
    """The caches of a handler, by name: here a dict of arrays that are written in place."""

    def __init__(self, caches: Caches) -> None:
        self._caches = caches

    def attach(self, handler: Any) -> None:
        """Put onto a new handler what its framework is to track, such as modules."""
        del handler  # not an empty body, of which TensorFlow's AutoGraph would warn

    def read(self) -> Caches:
        """Return the caches as they are now; writes to their arrays change them."""
        return self._caches

    def write(self, caches: Caches) -> None:
        """Take charge of the caches after a change; arrays written in place need nothing."""
        self._caches = caches

    def replace(self, caches: Caches) -> None:
        """Take caches of another capacity in the place of those that are here.

        Raises OptionError where shapes cannot change, before anything has.
        """
        self.write(caches)

    def generators(self, loss: Any) -> list[Any]:
        """Return what draws: the loss's generator, and its retrieval function's if it has one."""
        holders = (loss, getattr(loss, "retrieval_fn", None))
        found = [getattr(holder, "generator", None) for holder in holders]
        return [generator for generator in found if generator is not None]
