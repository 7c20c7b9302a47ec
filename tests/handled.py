"""Small handlers on three backends, for the tests of what handlers do."""

import numpy as np
import pytest
from backends import BACKENDS

HANDLED = pytest.mark.parametrize(
    "backend", [BACKENDS[name] for name in ("numpy", "torch", "tensorflow")], ids=lambda b: b.name
)


def specs_of(module, *, dtype="float64", **more):
    return {
        "x": module.FieldSpec((2,), "float64"),
        "embedding": module.FieldSpec((2,), dtype),
        **more,
    }


def handler_of(backend, *, capacity=4, dtype="float64", more=None, loss=None, **options):
    module = backend.module
    return module.CacheLossHandler(
        module.CacheManager(specs_of(module, dtype=dtype, **(more or {})), capacity),
        loss or module.CacheClassificationLoss("embedding", ("x",), generator=1),
        embedding_key="embedding",
        data_keys=("x",),
        **options,
    )


def multi_of(backend, sizes=(2, 3)):
    module = backend.module
    return module.MultiCacheLossHandler(
        {
            name: module.CacheManager(specs_of(module), n)
            for name, n in zip("ba", sizes, strict=True)
        },
        module.CacheClassificationLoss("embedding", ("x",), generator=1, reducer=None),
        embedding_key="embedding",
        data_keys=("x",),
    )


def batch_of(backend, seed, rows=2):
    x = backend.to_native(np.random.default_rng(seed).uniform(1.0, 2.0, (rows, 2)))
    query = backend.to_native(np.random.default_rng(seed + 100).standard_normal((rows, 2)))
    return query, x


def double(features):
    return features["x"] * 2.0


def failing(features):
    raise RuntimeError("out of memory")


def state_of(backend, handler):
    cache = backend.numpy(handler.cache)
    return {**cache.data, "age": cache.age}


def assert_same_state(ours, theirs):
    for key, value in theirs.items():
        np.testing.assert_array_equal(ours[key], value, err_msg=key)
