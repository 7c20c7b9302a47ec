"""What differs between Keras's backends: here, what most of them have alike."""

import contextlib
from typing import Any, ClassVar

import keras

from negcache_core import OptionError
from negcache_core.handlers import CacheLossHandler

SUPPORTED = ("tensorflow", "jax", "torch")


class Host:
    """One backend of Keras: what a layer asks of it."""

    package: ClassVar[str]  # the adapter

    def adopt(self, handler: CacheLossHandler) -> CacheLossHandler:
        """Return a handler that holds its state itself, as that of most libraries does."""
        return handler

    def attach(self, layer: Any, handler: CacheLossHandler) -> None:
        """Make the handler the layer's, unseen by what tracks attributes: files have its state."""
        vars(layer)["handler"] = handler

    def variables(self, handler: CacheLossHandler) -> list[Any]:
        """Return the Keras variables that hold the handler's state; none where others do."""
        del handler
        return []

    def check_placement(self) -> None:
        """Raise OptionError where a file of Keras's could not hold all of the state."""
        if keras.distribution.distribution() is not None:
            raise OptionError(
                f"a keras.distribution is set, and Keras runs on {keras.config.backend()}: a cache "
                "is for one device there. Run on JAX, or write the training loop as "
                "docs/scaling.md shows."
            )

    def quiet(self) -> contextlib.AbstractContextManager[Any]:
        """Keep a step from logging by itself: Keras writes the figures."""
        return contextlib.nullcontext()


def refuse() -> OptionError:
    """Return what to raise on a backend of Keras without gradients."""
    return OptionError(
        f"Keras runs on {keras.config.backend()}, and negcache_keras on {', '.join(SUPPORTED)}: "
        "set KERAS_BACKEND to one of these before Keras is imported."
    )
