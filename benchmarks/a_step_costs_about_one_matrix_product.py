"""Claim: a whole training step costs about one bare product of queries and cache.

A step is retrieval, loss, backward (where there is one) and the update of the cache, with a tower
that only looks rows up. It is compared with the bare float32 product q @ cache.T of the same
framework, which any method that scores the whole cache must pay, and with a reimplementation of the
published algorithm: a score matrix, noise for each score, and a copy of the tables on every update.

    python benchmarks/a_step_costs_about_one_matrix_product.py torch --slots 131072 --rows 8 64

Without sizes it runs the whole grid of _grid.FULL, or with --quick a small one. Sizes measured
earlier on this machine stay in the JSON.
"""

from typing import Any

from _grid import run
from _harness import milliseconds, ratio, ratios


def row_of(times: dict[str, list[float]]) -> dict[str, Any]:
    """Return the table's row for one size; least and largest are of step / product."""
    every = ratios(times, "step", "product")
    return {
        "product ms": milliseconds(times, "product"),
        "step / product": ratio(times, "step", "product"),
        "least": min(every),
        "largest": max(every),
        "published / product": ratio(times, "published", "product"),
    }


if __name__ == "__main__":
    # Ours, the published one's and its copy, and what filling them needs; scores, noise, softmax.
    names = ("product", "step", "published")
    run(str(__doc__), "step_cost", names, row_of, tables=4, matrices=5)
