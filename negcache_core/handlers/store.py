"""Where a handler's caches are kept. Adapters supply their own: tensors, variables, a pytree."""

from typing import Any

from negcache_core.cache.named import Caches


class Store:
    """The caches of a handler, by name: here a dict of arrays, written in place."""

    def __init__(self, caches: Caches) -> None:
        self._caches = caches

    def attach(self, handler: Any) -> None:
        """Attach to a new handler what its framework should track, such as modules."""
        del handler  # not an empty body: TensorFlow's AutoGraph would warn

    def read(self) -> Caches:
        """Return the current caches; writes to their arrays change them."""
        return self._caches

    def write(self, caches: Caches) -> None:
        """Store the caches after a change; arrays written in place need nothing."""
        self._caches = caches

    def replace(self, caches: Caches) -> None:
        """Replace the caches with ones of another capacity.

        Raises OptionError if shapes cannot change, before anything does.
        """
        self.write(caches)

    def generators(self, loss: Any) -> list[Any]:
        """Return the generators: the loss's, and its retrieval function's if it has one."""
        holders = (loss, getattr(loss, "retrieval_fn", None))
        found = [getattr(holder, "generator", None) for holder in holders]
        return [generator for generator in found if generator is not None]
