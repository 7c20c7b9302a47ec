"""Keras on TensorFlow: a handler holds its state in its own variables, written in place."""

import contextlib
from typing import Any

import tensorflow as tf
from negcache_tensorflow import NegativeCacheLoss

from negcache_core import OptionError
from negcache_core.handlers import CacheLossHandler

from ._host import Host

__all__ = ["HOST", "NegativeCacheLoss"]


class TensorFlowHost(Host):
    """TensorFlow, eager or traced, with or without XLA."""

    package = "negcache_tensorflow"

    def attach(self, layer: Any, handler: CacheLossHandler) -> None:
        """Set layer.handler so that tf.train.Checkpoint finds it too."""
        layer.handler = handler

    def check_placement(self) -> None:
        """Refuse several replicas."""
        super().check_placement()
        if tf.distribute.get_strategy().num_replicas_in_sync > 1:
            raise OptionError(
                "the handler's cache is on several replicas, whose state Keras's files cannot "
                "hold: write the training loop as docs/scaling.md shows."
            )

    def quiet(self) -> contextlib.AbstractContextManager[Any]:
        """Record no summaries: in a graph they never change their step, and XLA has none."""
        return tf.summary.record_if(False)  # noqa: FBT003 - TensorFlow's own signature


HOST = TensorFlowHost()
