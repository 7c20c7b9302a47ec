"""The errors that negcache raises: each is also a ValueError or a TypeError.

Every message says what was given, what was expected, and what to do.
"""

from typing import TYPE_CHECKING


class NegcacheError(Exception):
    """The base class of every error that negcache raises on purpose."""

    if not TYPE_CHECKING:
        # While tracing, AutoGraph re-raises an error in its own type only if it has exactly this
        # constructor; otherwise tf.function would show a StagingError.
        __init__ = Exception.__init__


class ShapeError(NegcacheError, ValueError):
    """An array has the wrong shape."""


class KeysError(NegcacheError, ValueError):
    """A mapping lacks a field or a cache, or has an unknown one."""


class CapacityError(NegcacheError, ValueError):
    """More rows or top-k groups are asked for than the cache has slots."""


class OptionError(NegcacheError, ValueError):
    """An option has a value that cannot work, or conflicts with another option."""


class DTypeError(NegcacheError, TypeError):
    """An array or a field has the wrong dtype."""


class KindError(NegcacheError, TypeError):
    """An argument has the wrong Python type."""


class CheckpointError(NegcacheError, ValueError):
    """A file is not a complete checkpoint, or not one of this cache."""


class DeviceError(NegcacheError, ValueError):
    """Arrays that are used together are on different devices."""


class NonFiniteWarning(UserWarning):
    """A cache that was loaded had embeddings that are not finite. Their slots were emptied."""


class TrainingWarning(UserWarning):
    """Something is plainly wrong with the training: the cache does more harm than good."""
