"""Claim: storing embeddings in half types or int8 hardly moves the loss or its gradient.

Embeddings have length 1, as from towers with normalisation; scores are 20 times cosines. Everything
else is float64, so the differences come only from rounding: of the rows, and, where "as stored" is
yes, also of the queries to the rows' dtype, and of the readout's probabilities to bfloat16 (float16
for float16), as on a GPU.

    python benchmarks/half_storage_costs_little_accuracy.py
"""

from typing import Any

import ml_dtypes
import numpy as np
from _harness import save, table

from negcache_core.arrays.numerics import log_sum_exp
from negcache_core.cache.quantized import dequantize, quantize
from negcache_core.exact import softmax_cross_entropy

QUERIES, SCALE = 32, 20.0


def unit(rng: np.random.Generator, rows: int, width: int) -> Any:
    """Return random rows of length 1."""
    drawn = rng.standard_normal((rows, width))
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def rounded_to(dtype: Any, rows: Any) -> Any:
    """Return rows as a cache of that dtype holds them."""
    if dtype == np.int8:
        return dequantize(*quantize(rows)).astype(np.float64)
    return rows.astype(dtype).astype(np.float64)


def measure(dtype: Any, slots: int, width: int, *, as_stored: bool) -> dict[str, Any]:
    """Return what rounding a cache to `dtype` does to its log-partition and gradients."""
    rng = np.random.default_rng(0)
    queries, items = unit(rng, QUERIES, width), unit(rng, slots, width)
    # Positives near their queries, as in training: cosines of about 0.5.
    positives = queries + unit(rng, QUERIES, width) * np.sqrt(3)
    positives /= np.linalg.norm(positives, axis=1, keepdims=True)
    rounded, asked = rounded_to(dtype, items), queries
    if as_stored:
        asked = rounded_to(dtype, queries)
    log_partitions = [
        log_sum_exp(SCALE * each @ rows.T) for each, rows in ((queries, items), (asked, rounded))
    ]
    shift = log_partitions[1] - log_partitions[0]
    exact = softmax_cross_entropy(queries, positives, items, scale=SCALE).gradients
    # Probabilities are those of the rounded scores; gradients go through queries and fresh rows.
    positive = SCALE * np.sum(queries * positives, axis=1)
    log_total = np.logaddexp(positive, log_partitions[1])[:, None]
    probabilities = np.exp(SCALE * asked @ rounded.T - log_total)
    if as_stored:  # of each block's largest, as the kernels have them
        top = probabilities.max(axis=1, keepdims=True)
        half = np.float16 if dtype == np.float16 else ml_dtypes.bfloat16
        read = top * (probabilities / top).astype(half).astype(np.float64)
    else:
        read = probabilities
    pull = np.exp(positive - log_total[:, 0])[:, None] - 1.0
    # A readout of the rows as stored, which the drawn rows then put right, in expectation.
    target = pull * positives + read @ rounded + probabilities @ (items - rounded)
    found = {
        "query": SCALE * target / QUERIES,
        "items": SCALE * probabilities.T @ queries / QUERIES,
    }
    return {
        "dtype": np.dtype(dtype).name,
        "as stored": "yes" if as_stored else "no",
        "slots": slots,
        "width": width,
        "log-partition: mean shift": float(shift.mean()),
        "spread": float(shift.std()),
        **{
            f"gradient error, {name}": float(
                np.linalg.norm(found[name] - getattr(exact, name))
                / np.linalg.norm(getattr(exact, name))
            )
            for name in found
        },
    }


if __name__ == "__main__":
    found = [
        measure(dtype, slots, width, as_stored=as_stored)
        for dtype in (ml_dtypes.bfloat16, np.float16, np.int8)
        for as_stored in (False, True)
        for slots in (8_192, 65_536)
        for width in (128, 768)
    ]
    print(table(found))
    print("written to", save("half_storage", found))
