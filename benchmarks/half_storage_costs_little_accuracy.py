"""Claim: storing embeddings in bfloat16 or float16 hardly moves the loss or its gradient.

Embeddings have length 1, as from towers with normalisation; scores are 20 times cosines. Everything
except the storage is float64, so the differences come only from rounding the rows.

    python benchmarks/half_storage_costs_little_accuracy.py
"""

from typing import Any

import ml_dtypes
import numpy as np
from _harness import save, table

from negcache_core.arrays.numerics import log_sum_exp
from negcache_core.exact import softmax_cross_entropy

QUERIES, SCALE = 32, 20.0


def unit(rng: np.random.Generator, rows: int, width: int) -> Any:
    """Return random rows of length 1."""
    drawn = rng.standard_normal((rows, width))
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def measure(dtype: Any, slots: int, width: int) -> dict[str, Any]:
    """Return what rounding a cache to `dtype` does to its log-partition and gradients."""
    rng = np.random.default_rng(0)
    queries, items = unit(rng, QUERIES, width), unit(rng, slots, width)
    # Positives near their queries, as in training: cosines of about 0.5.
    positives = queries + unit(rng, QUERIES, width) * np.sqrt(3)
    positives /= np.linalg.norm(positives, axis=1, keepdims=True)
    rounded = items.astype(dtype).astype(np.float64)
    log_partitions = [log_sum_exp(SCALE * queries @ each.T) for each in (items, rounded)]
    shift = log_partitions[1] - log_partitions[0]
    exact, ours = (
        softmax_cross_entropy(queries, positives, each, fresh_items=items, scale=SCALE).gradients
        for each in (items, rounded)
    )
    return {
        "dtype": np.dtype(dtype).name,
        "slots": slots,
        "width": width,
        "log-partition: mean shift": float(shift.mean()),
        "spread": float(shift.std()),
        **{
            f"gradient error, {name}": float(
                np.linalg.norm(getattr(ours, name) - getattr(exact, name))
                / np.linalg.norm(getattr(exact, name))
            )
            for name in ("query", "items")
        },
    }


if __name__ == "__main__":
    found = [
        measure(dtype, slots, width)
        for dtype in (ml_dtypes.bfloat16, np.float16)
        for slots in (8_192, 65_536)
        for width in (128, 768)
    ]
    print(table(found))
    print("written to", save("half_storage", found))
