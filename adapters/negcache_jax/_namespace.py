"""jax.numpy, with the few functions of the core that JAX keeps elsewhere."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.numpy import *  # noqa: F403 - this module is jax.numpy and a little more

index_dtype = int  # int64, or int32 without x64, even if that is switched later


def device_of(array: Array) -> None:
    """Return None: JAX places arrays itself, and under jit their device is not known."""
    del array


def arange(  # type: ignore[no-redef] # instead of jax.numpy's, as what follows
    stop: Any, *, dtype: Any = None, device: Any = None
) -> Array:
    """Return 0 … stop - 1."""
    del device
    return jnp.arange(stop, dtype=dtype)


def full(  # type: ignore[no-redef]
    shape: Any, value: Any, *, dtype: Any, device: Any = None
) -> Array:
    """Return an array of one value."""
    del device
    return jnp.full(shape, value, dtype=dtype)


def largest(values: Array, count: int) -> Array:
    """Return the positions of the `count` largest; top_k keeps the order of equal elements."""
    return jax.lax.top_k(values, count)[1]


def put_rows(table: Array, slots: Array, rows: Array) -> Array:
    """Return the table with `rows` at `slots`; in place under jit if the table is donated."""
    return table.at[slots].set(rows)


def take_rows(array: Array, indices: Array) -> Array:
    """Return rows by index; the core's indices are always in range."""
    return array.at[indices].get(mode="promise_in_bounds")


def matmul(left: Array, right: Array) -> Array:  # type: ignore[no-redef]
    """Multiply at full precision, whatever the default for matrix units."""
    return jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)


def product_in(dtype: Any, left: Array, right: Array) -> Array:
    """Return left @ right, both of one smaller dtype, added up and returned in `dtype`."""
    return jnp.matmul(left, right, preferred_element_type=dtype)


def matmul_transposed(left: Array, right: Array) -> Array:
    """Return left @ right.T."""
    return matmul(left, right.T)
