"""JAX with everything on its first device: the conformance kit, eager and jitted."""

import os

import jax
import negcache_jax
import numpy as np
import pytest

from negcache_core.testing import CHECKS, Adapter


def gradients(function, arrays, *constants, wrap=lambda function: function):
    return [
        np.asarray(each)
        for each in wrap(jax.grad(function, argnums=tuple(range(len(arrays)))))(*arrays, *constants)
    ]


JAX = Adapter(
    "jax",
    negcache_jax,
    jax.numpy.asarray,
    np.asarray,
    bind=lambda handler, cache: handler.bind(
        handler.init(jax.random.key(0))._replace(caches={"cache": cache})
    ),
    hold=lambda handler, seed: handler.bind(handler.init(jax.random.key(seed))),
    run=lambda function, state, batch: jax.jit(function)(state, batch),
    gradients=lambda *arguments: gradients(*arguments, wrap=jax.jit),
)
WITH_REPLICAS = ("replicas", "shards")


def test_it_is_a_gpu():
    assert jax.default_backend() == os.environ.get("NEGCACHE_DEVICE", "gpu").replace("cuda", "gpu")


@pytest.mark.parametrize("check", [name for name in CHECKS if name not in WITH_REPLICAS])
def test_the_device_passes_the_conformance_kit(check):
    CHECKS[check](JAX)
