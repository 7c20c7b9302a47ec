"""Host, the differences between Keras's backends, with the behavior that most of them share."""

import contextlib
from typing import Any, ClassVar

import keras

from negcache_core import OptionError
from negcache_core.handlers import CacheLossHandler

SUPPORTED = ("tensorflow", "jax", "torch")


class Host:
    """One backend of Keras: everything that a layer needs from it."""

    package: ClassVar[str]  # of the adapter

    def adopt(self, handler: CacheLossHandler) -> CacheLossHandler:
        """Return a handler that holds its own state; most adapters' handlers already do."""
        return handler

    def attach(self, layer: Any, handler: CacheLossHandler) -> None:
        """Set layer.handler without attribute tracking: the layer saves its state itself."""
        vars(layer)["handler"] = handler

    def variables(self, handler: CacheLossHandler) -> list[Any]:
        """Return the Keras variables that hold the handler's state, if any."""
        del handler
        return []

    def check_placement(self) -> None:
        """Raise OptionError where a Keras file could not hold the whole state."""
        if keras.distribution.distribution() is not None:
            raise OptionError(
                f"a keras.distribution is set, and Keras runs on {keras.config.backend()}: a cache "
                "is for one device there. Run on JAX, or write the training loop as "
                "docs/scaling.md shows."
            )

    def quiet(self) -> contextlib.AbstractContextManager[Any]:
        """Stop a step from logging: Keras writes the metrics."""
        return contextlib.nullcontext()


def refuse() -> OptionError:
    """Return the error for a Keras backend without gradients."""
    return OptionError(
        f"Keras runs on {keras.config.backend()}, and negcache_keras on {', '.join(SUPPORTED)}: "
        "set KERAS_BACKEND to one of these before Keras is imported."
    )
