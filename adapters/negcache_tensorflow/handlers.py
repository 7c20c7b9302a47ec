"""Handlers, under the published module name."""

from ._bound import CacheLossHandler, MultiCacheLossHandler, NegativeCacheLoss

__all__ = ["CacheLossHandler", "MultiCacheLossHandler", "NegativeCacheLoss"]
