"""Every backend under test, as the conformance kit wants it described."""

import functools

import array_api_strict
import jax
import negcache_jax
import negcache_tensorflow
import numpy as np
import tensorflow as tf
from torch_backend import TORCH

from negcache_core.arrays.backend import Backend
from negcache_core.testing import NUMPY_ADAPTER, Adapter, bind


class StrictBackend(Backend):
    """array-api-strict: what it refuses, the standard does not promise."""

    name = "array-api-strict"

    def write_rows(self, table, slots, rows):
        table[...] = self.xp.put_rows(table, slots, rows)  # the standard has no indexed write
        return table


def _jax_gradients(function, arrays, *constants, wrap=lambda function: function):
    gradients = _jax_gradient_of(function, len(arrays), wrap)(*arrays, *constants)
    return [np.asarray(gradient) for gradient in gradients]


@functools.lru_cache(maxsize=1)  # a function that comes again was compiled already
def _jax_gradient_of(function, count, wrap):
    return wrap(jax.grad(function, argnums=tuple(range(count))))


def _tensorflow_run(function, state, batch, *, jit_compile):
    """Trace with unknown first sizes of the batch; the state's sizes are known."""
    signature = tf.nest.map_structure(
        lambda leaf: tf.TensorSpec([None, *leaf.shape[1:]], leaf.dtype), batch
    )
    traced = tf.function(
        function,
        jit_compile=jit_compile,
        autograph=False,  # the slow part; tests of the adapter convert what they trace
        input_signature=[tf.nest.map_structure(tf.TensorSpec.from_tensor, state), signature],
    )
    return traced(state, batch)


def _tensorflow_gradients(function, arrays, *constants, wrap=lambda function: function):
    gradients = _tensorflow_gradient_of(function, len(arrays), wrap)(*arrays, *constants)
    return [gradient.numpy() for gradient in gradients]


@functools.lru_cache(maxsize=1)
def _tensorflow_gradient_of(function, count, wrap):
    def gradients(*arrays):
        with tf.GradientTape() as tape:
            tape.watch(arrays[:count])
            value = function(*arrays)
        return tape.gradient(value, arrays[:count])

    return wrap(gradients)


def _tensorflow(name, **options):
    return Adapter(
        name,
        negcache_tensorflow,
        tf.convert_to_tensor,
        lambda tensor: tensor.numpy() if hasattr(tensor, "numpy") else tensor,
        **options,
    )


NUMPY = NUMPY_ADAPTER
STRICT = Adapter(
    "array-api-strict",
    bind(StrictBackend(array_api_strict)),
    array_api_strict.asarray,
    np.asarray,
    dtypes=tuple(dtype for dtype in NUMPY.dtypes if dtype != "float16"),  # not in the standard
)
TENSORFLOW = _tensorflow("tensorflow", gradients=_tensorflow_gradients)
TENSORFLOW_GRAPH = _tensorflow(
    "tf.function",
    run=functools.partial(_tensorflow_run, jit_compile=False),
    gradients=functools.partial(
        _tensorflow_gradients, wrap=functools.partial(tf.function, autograph=False)
    ),
)
TENSORFLOW_XLA = _tensorflow(
    "tf.function+xla",
    run=functools.partial(_tensorflow_run, jit_compile=True),
    gradients=functools.partial(
        _tensorflow_gradients,
        wrap=functools.partial(tf.function, jit_compile=True, autograph=False),
    ),
)

JAX = Adapter(
    "jax",
    negcache_jax,
    jax.numpy.asarray,
    np.asarray,
    bind=lambda handler, cache: handler.bind(
        handler.init(jax.random.key(0))._replace(caches={"cache": cache})
    ),
    hold=lambda handler, seed: handler.bind(handler.init(jax.random.key(seed))),
    gradients=_jax_gradients,
)
JAX_JIT = JAX._replace(
    name="jax.jit",
    run=lambda function, state, batch: jax.jit(function)(state, batch),
    gradients=functools.partial(_jax_gradients, wrap=jax.jit),
)

BACKENDS = {
    backend.name: backend
    for backend in (
        NUMPY,
        STRICT,
        TORCH,
        TENSORFLOW,
        TENSORFLOW_GRAPH,
        TENSORFLOW_XLA,
        JAX,
        JAX_JIT,
    )
}
# JAX compiles every operation anew for each shape, so that properties over random shapes take
# minutes there: the conformance kit, and a few examples of the central properties, run on it.
EAGER = {name: BACKENDS[name] for name in ("numpy", "array-api-strict", "torch", "tensorflow")}
