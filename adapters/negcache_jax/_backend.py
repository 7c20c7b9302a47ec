"""The verbs that JAX supplies to the core."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.custom_derivatives import SymbolicZero

from negcache_core import KindError, OptionError
from negcache_core.adapter import Backend

from . import _namespace


class KeyStream:
    """Keys for the draws of one call, each used once."""

    def __init__(self, key: Array) -> None:
        self.key = key

    def next(self) -> Array:
        """Return a fresh key."""
        self.key, fresh = jax.random.split(self.key)
        return fresh


def check_key(key: Any, what: str) -> Array:
    """Return `key` if it is one random key, typed or of uint32; raise KindError otherwise."""
    if isinstance(key, Array):
        typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        if (typed and key.shape == ()) or (key.dtype == jnp.uint32 and key.shape in {(2,), (4,)}):
            return key
    raise KindError(f"{what} is {key!r}: expected one random key, such as jax.random.key(0).")


class JaxBackend(Backend[Array]):
    """JAX, eager or under jit; arrays are written in place only by donation."""

    name = "jax"
    slices_copy = True

    def to_array(self, value: Any) -> Array:
        return jnp.asarray(value)

    def generator_state(self, generator: KeyStream) -> tuple[str, Any]:
        data = jax.random.key_data(generator.key)
        return str(jax.random.key_impl(generator.key)), np.asarray(data).tolist()

    def set_generator_state(self, generator: KeyStream, state: Any) -> None:
        data = jnp.asarray(state, jnp.uint32)
        typed = jnp.issubdtype(generator.key.dtype, jax.dtypes.prng_key)
        impl = jax.random.key_impl(generator.key)
        generator.key = jax.random.wrap_key_data(data, impl=impl) if typed else data

    def owns(self, value: Any) -> bool:
        return isinstance(value, Array)

    def truth(self, value: Array) -> bool | None:
        return None if isinstance(value, jax.core.Tracer) else bool(value)

    def stop_gradient(self, array: Array) -> Array:
        return jax.lax.stop_gradient(array)

    def watch_gradients(
        self, arrays: Sequence[Array], check: Callable[[Sequence[bool | None]], None]
    ) -> Sequence[Array]:
        @jax.custom_jvp
        def same(*arrays: Array) -> tuple[Array, ...]:
            return arrays

        def rule(primals: Any, tangents: Any) -> Any:
            check([not isinstance(each, SymbolicZero) for each in tangents])
            return primals, tangents

        same.defjvp(rule, symbolic_zeros=True)
        watched: tuple[Array, ...] = same(*arrays)
        return watched

    def slice_rows(self, array: Array, start: Any, size: int) -> Array:
        return jax.lax.dynamic_slice_in_dim(array, start, size)

    def scan_tiles(
        self, function: Callable[..., Any], carry: tuple[Array, ...], count: int
    ) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        carry, stacks = jax.lax.scan(function, carry, jnp.arange(count))
        return carry, tuple(part.reshape(-1, part.shape[2]) for part in stacks)

    def map_chunks(
        self, function: Callable[..., Array], arrays: Sequence[Array], size: int
    ) -> Array:
        again: Callable[..., Array] = jax.checkpoint(function)
        rows = arrays[0].shape[0]
        whole = rows - rows % size
        parts = []
        if whole:  # a loop: the program and the memory of one chunk
            cut = [array[:whole].reshape(whole // size, size, *array.shape[1:]) for array in arrays]
            stack = jax.lax.map(lambda chunk: again(*chunk), cut)
            parts.append(stack.reshape(whole, *stack.shape[2:]))
        if whole < rows or not rows:
            parts.append(again(*[array[whole:] for array in arrays]))
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts)

    def multiplies_as_stored(self, table: Array) -> bool:
        return jax.default_backend() != "cpu"

    def product_as_stored(self, rows: Array, queries: Array) -> Array:
        wide = jnp.int32 if rows.dtype == jnp.int8 else jnp.float32
        return _namespace.product_in(wide, rows, queries.T).astype(jnp.float32)

    def sum_of_rows(self, weights: Array, rows: Array) -> Array:
        if rows.dtype == weights.dtype:
            return _namespace.matmul(weights, rows)
        dtype = jnp.bfloat16 if rows.dtype == jnp.int8 else rows.dtype  # it holds every code
        return _namespace.product_in(jnp.float32, weights.astype(dtype), rows.astype(dtype))

    def check_fused(self) -> None:
        return  # where it runs is known only when a step is traced

    def fused_block_weights(
        self, queries: Array, table: Array, age: Array, **facts: Any
    ) -> tuple[Array, tuple[Array, Array] | None]:
        from ._fused import block_weights  # noqa: PLC0415 - few need Pallas, which loads slowly

        return block_weights(queries, table, age, **facts)

    def write_rows(self, table: Array, slots: Array, rows: Array) -> Array:
        return _namespace.put_rows(table, slots, rows)

    def overwrite(self, table: Array, values: Array) -> Array:
        return values

    def from_host(self, table: Array, values: np.ndarray[Any, Any]) -> Array:
        return jax.device_put(values, getattr(table, "sharding", None))

    def make_generator(self, seed: Any) -> None:
        if seed is not None:
            raise KindError(
                f"generator is {seed!r}: JAX keeps no hidden random state. Leave it out, and pass "
                "key= to the call (a handler takes its key from the state)."
            )

    def remember(self, generator: KeyStream | None) -> Callable[[], Any] | None:
        if generator is None:
            return None
        before = generator.key
        return lambda: setattr(generator, "key", before)

    def uniform(self, generator: KeyStream | None, shape: tuple[int, ...], like: Array) -> Array:
        if generator is None:
            raise OptionError("a draw needs randomness: pass key=jax.random.key(…), or noise=.")
        return jax.random.uniform(generator.next(), shape, dtype=jnp.result_type(float))


JAX = JaxBackend(_namespace)
