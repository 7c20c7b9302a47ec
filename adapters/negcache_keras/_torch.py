"""Keras on PyTorch: a handler's own tensors hold its state, on the device that Keras uses."""

from typing import Any

import keras
import negcache_torch
import torch

from negcache_core import OptionError

from ._host import Host


class TorchHost(Host):
    """PyTorch, compiled or not.

    The layer keeps the handler out of its modules: what is done to those by PyTorch is no matter
    for it, and whether it learns is said by the call.
    """

    package = "negcache_torch"

    def check_placement(self) -> None:
        """Refuse several processes."""
        if torch.compiler.is_compiling():
            return
        super().check_placement()
        ranks = torch.distributed
        if ranks.is_available() and ranks.is_initialized() and ranks.get_world_size() > 1:
            raise OptionError(
                f"{ranks.get_world_size()} processes train, each with a cache of its own, and "
                "Keras's files hold that of one: write the training loop as docs/scaling.md shows."
            )


class NegativeCacheLoss(negcache_torch.NegativeCacheLoss):
    """Cross-entropy of each query's item against everything in a cache, on Keras's device.

    See `negcache_torch.NegativeCacheLoss`.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        device = keras.ops.zeros(()).device
        if device.type == "meta":
            raise OptionError(
                "the loss is made while Keras finds out shapes, on the meta device, where nothing "
                "is kept: make it in the model's __init__."
            )
        with device:
            super().__init__(*arguments, **options)


HOST = TorchHost()
