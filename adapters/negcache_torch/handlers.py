"""Handlers, under the published module name."""

from ._bound import CacheLossHandler, MultiCacheLossHandler

__all__ = ["CacheLossHandler", "MultiCacheLossHandler"]
