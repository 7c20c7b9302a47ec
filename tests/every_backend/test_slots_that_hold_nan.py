"""Slots that were emptied may hold NaN; a query that finds nothing to draw must not read it."""

import numpy as np
import pytest
from backends import BACKENDS

from negcache_core import EMPTY
from negcache_core.cache.quantized import quantize

WIDTH, SLOTS, ROWS = 3, 5, 2


def losses(backend, rows, options):
    """Return two queries' losses, of which the second has no row of its group."""
    module, data = backend.module, {"x": rows, "embedding": rows, "group": np.zeros(SLOTS, "int32")}
    if options.pop("coded", False):
        data["embedding"], data["embedding_scale"] = quantize(rows)
    age = np.asarray([EMPTY, 3, EMPTY, 0, 1], np.int32)
    cache = module.NegativeCache(
        {key: backend.to_native(array) for key, array in data.items()}, backend.to_native(age)
    )
    loss = module.CacheClassificationLoss(
        "embedding", ("x",), reducer=None, group_key="group", **options
    )
    fresh = backend.to_native(np.ones((ROWS, WIDTH), np.float32))
    found = loss.retrieve(
        fresh,
        cache,
        pos_features={"x": fresh, "group": backend.to_native(np.arange(ROWS, dtype="int32"))},
        noise=backend.to_native(np.full((ROWS, 1, 2), 0.5, np.float32)),
    )
    assert np.asarray(found.drawn).tolist() == [[True], [False]]
    return np.asarray(loss.loss_from_negatives(fresh, fresh, found.features["x"], found).loss)


EXACT = {"estimator": "exact_query", "coded": True}
CORRECTED = [{"estimator": name, "staleness_correction": True} for name in ("paper", "shared")]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *(("numpy", options) for options in ({"estimator": "exact_query"}, *CORRECTED)),
        *((name, EXACT) for name in ("numpy", "torch", "tensorflow", "jax")),
    ],
)
def test_a_query_without_a_usable_slot_reads_no_nan(name, options):
    rows = np.random.default_rng(0).standard_normal((SLOTS, WIDTH)).astype(np.float32)
    expected = losses(BACKENDS[name], rows, dict(options))
    rows[[0, 2]] = np.nan
    found = losses(BACKENDS[name], rows, dict(options))
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found, expected)
