"""What a user's functions return, checked: scale, score transform, reducer."""

import math
from collections.abc import Callable
from typing import Any

from negcache_core.arrays._array import Array, cast, dtype_kind, dtype_name
from negcache_core.arrays.backend import Backend
from negcache_core.arrays.validation import as_array, check_number, shape_of
from negcache_core.errors import DeviceError, DTypeError, KindError, OptionError, ShapeError


def check_scale(scale: Any, backend: Backend) -> Any:
    """Return `scale`; raise unless it is None, a finite number, an array or a function."""
    known = callable(scale) or (hasattr(scale, "shape") and hasattr(scale, "dtype"))
    if scale is not None and not known:
        check_number(scale, "scale")
    if known and not callable(scale) and backend.has_graph(scale):
        raise OptionError(
            "scale is a tensor that was computed from others: its graph lasts for one step, so "
            "the next could not differentiate it. Pass the parameter itself, scale=log_scale, "
            "or a function that computes it in every step, scale=lambda: log_scale.exp()."
        )
    return scale


def scale_for(scale: Any, like: Array, backend: Backend) -> Any:
    """Return a number, or an array of one value that fits `like`; call a function."""
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
    # Scalars on the host work with arrays on any device.
    if backend.has_devices and array.device != like.device and str(array.device) != "cpu":
        raise DeviceError(f"scale is on {array.device}, but the queries are on {like.device}.")
    return array


def transformed(
    function: Callable[[Array], Array], scores: Array, dtype: Any, backend: Backend
) -> Array:
    """Return function(scores), in `dtype`; raise unless it is an array of the scores' shape."""
    result = as_array(function(scores), "what score_transform returned", backend)
    if shape_of(result, "what score_transform returned") != shape_of(scores, "scores"):
        raise ShapeError(
            f"score_transform returned shape {tuple(result.shape)} for scores of shape "
            f"{tuple(scores.shape)}: expected the same shape, because it acts on each score "
            "separately."
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
