"""Keras on PyTorch: a handler holds its state in its own tensors, on Keras's device."""

from typing import Any

import keras
import negcache_torch
import torch

from negcache_core import OptionError

from ._host import Host


class TorchHost(Host):
    """PyTorch, compiled or not.

    The handler is not a submodule of the layer: what PyTorch does to modules, such as `.eval()`,
    does not affect it. The `training` argument of a call decides whether the cache is updated.
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
