"""Imports the parts for the backend that Keras runs on, and no other framework."""

from importlib import import_module
from typing import Any

import keras

from ._host import SUPPORTED, Host, refuse

HOST: Host | None
if keras.config.backend() in SUPPORTED:
    _module = import_module(f"._{keras.config.backend()}", __package__)
    HOST, NegativeCacheLoss = _module.HOST, _module.NegativeCacheLoss
else:
    HOST = None

    class NegativeCacheLoss:
        """Raises OptionError: the backend has no gradients."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            del arguments, options
            raise refuse()
