"""Handlers, under the published module name."""

from ._bound import CacheLossHandler, MultiCacheLossHandler, NegativeCacheLoss
from ._store import HandlerState

__all__ = ["CacheLossHandler", "HandlerState", "MultiCacheLossHandler", "NegativeCacheLoss"]
