"""Claim: a whole training step costs about one bare product of queries and cache.

A step is retrieval, loss, backward (where there is one) and the update of the cache, with a tower
that only looks rows up. Beside it: the bare float32 product q @ cache.T of the same framework,
which any method that scores the whole cache must pay; and the published algorithm, stated anew,
with its score matrix, noise for each score, and a copy of the tables on every update.

    python benchmarks/a_step_costs_about_one_matrix_product.py torch --slots 131072 --rows 8 64
"""

import argparse
import importlib
from collections.abc import Callable
from typing import Any

from _harness import interleaved, save, table

VOCABULARY = 1_000
FRAMEWORKS = ("numpy", "torch", "tensorflow", "jax")


def measure(framework: str, slots: int, width: int, rows: int, rounds: int) -> dict[str, Any]:
    """Return the row of the table for one size."""
    candidates: dict[str, Callable[[], Any]] = importlib.import_module(
        f"_steps_{framework}"
    ).candidates(slots, width, rows, VOCABULARY)
    times = interleaved(candidates, rounds=rounds, baseline="product")
    return {
        "framework": framework,
        "slots": slots,
        "width": width,
        "rows": rows,
        "product ms": 1e3 * times["product"]["seconds"],
        **{f"{name} / product": times[name]["ratio"] for name in candidates if name != "product"},
        "least": times["step"]["least"],
        "largest": times["step"]["largest"],
    }


def main() -> None:
    """Measure the sizes asked for, print a table, and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("framework", choices=FRAMEWORKS)
    parser.add_argument("--slots", type=int, nargs="+", default=[16_384, 131_072])
    parser.add_argument("--width", type=int, nargs="+", default=[128, 768])
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    found = [
        measure(options.framework, slots, width, rows, options.rounds)
        for slots in options.slots
        for width in options.width
        for rows in options.rows
    ]
    print(table(found))
    print("written to", save(f"step_cost_{options.framework}", found))


if __name__ == "__main__":
    main()
