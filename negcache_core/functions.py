"""What a user's functions return, checked: scale, score transform, reducer, choice of slots."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from negcache_core._array import Array, cast, dtype_kind, dtype_name, index_dtype
from negcache_core.arguments import as_array, check_number, shape_of
from negcache_core.backend import Backend
from negcache_core.errors import DeviceError, DTypeError, KindError, OptionError, ShapeError


def check_scale(scale: Any) -> Any:
    """Return `scale`; raise unless it is None, a finite number, an array or a function."""
    known = callable(scale) or (hasattr(scale, "shape") and hasattr(scale, "dtype"))
    if scale is not None and not known:
        check_number(scale, "scale")
    return scale


def scale_for(scale: Any, like: Array, backend: Backend) -> Any:
    """Return a number, or an array of one value that goes with `like`; a function is called."""
    value = scale() if callable(scale) else scale
    if isinstance(value, (int, float)):
        check_number(value, "scale")
        return value
    array = as_array(value, "scale", backend)
    sizes = shape_of(array, "scale")
    if None not in sizes and math.prod(sizes) != 1:
        raise ShapeError(f"scale has shape {sizes}: expected one value, shape ().")
    if dtype_kind(array.dtype) not in {"floating", "integer"}:
        raise DTypeError(f"scale has dtype {dtype_name(array.dtype)}: expected a floating one.")
    device = backend.device(array)
    # Scalars on the host go with arrays anywhere.
    if device is not None and device != backend.device(like) and str(device) != "cpu":
        raise DeviceError(f"scale is on {device} and the queries on {backend.device(like)}.")
    return array


def transformed(
    function: Callable[[Array], Array], scores: Array, dtype: Any, backend: Backend
) -> Array:
    """Return function(scores), in `dtype`; raise unless it is an array of the scores' shape."""
    result = as_array(function(scores), "what score_transform returned", backend)
    if shape_of(result, "what score_transform returned") != shape_of(scores, "scores"):
        raise ShapeError(
            f"score_transform returned shape {tuple(result.shape)} for scores of shape "
            f"{tuple(scores.shape)}: expected the same shape, as it acts on each score alone."
        )
    if dtype_kind(result.dtype) != "floating":
        raise DTypeError(
            f"score_transform returned dtype {dtype_name(result.dtype)}: expected floating scores."
        )
    return cast(result, dtype, backend.xp)


def reduced(reducer: Callable[[Array], Array], values: Array, backend: Backend) -> Array:
    """Return reducer(values); raise unless it is a floating array."""
    result = reducer(values)
    if not hasattr(result, "shape") or not hasattr(result, "dtype"):
        raise KindError(
            f"reducer returned a {type(result).__name__}: expected an array, such as the mean of "
            "the (B,) losses that it is given."
        )
    result = as_array(result, "what reducer returned", backend)
    if dtype_kind(result.dtype) != "floating":
        raise DTypeError(
            f"reducer returned dtype {dtype_name(result.dtype)}: expected floating losses."
        )
    return result


def choice(chosen: Any, rows: Any, backend: Backend) -> Array:
    """Check what a user's retrieval function returned, and return it as (B, S) integers."""
    xp = backend.xp
    chosen = as_array(chosen, "what retrieval_fn returned", backend)
    if len(chosen.shape) == 1:
        chosen = chosen[:, None]
    sized = len(chosen.shape) == 2 and (rows in (None, chosen.shape[0]) or chosen.shape[0] is None)
    if not sized or chosen.shape[1] == 0 or dtype_kind(chosen.dtype) != "integer":
        raise OptionError(
            f"retrieval_fn returned shape {tuple(chosen.shape)} and dtype {chosen.dtype} for "
            f"{rows} queries: expected integer slots of shape (B, 1), or (B, S) for S draws each."
        )
    return cast(chosen, index_dtype(xp), xp)


class UndoneOnError(AbstractContextManager[None]):
    """A context that calls functions, such as those of `Backend.remember`, if an error passes it.

    So a step that fails has drawn nothing: the next one goes on as if it had not been.
    """

    def __init__(self, undo: Sequence[Callable[[], Any]]) -> None:
        self._undo = undo

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, *error: object) -> None:
        if kind is not None:
            for undo in self._undo:
                undo()
