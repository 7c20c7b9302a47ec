"""Claim: writing a step's rows into the cache costs the same at any capacity.

The update alone: the drawn rows' fresh embeddings go back in place and the batch's own items over
the oldest slots. It moves B x D numbers, and makes one pass over the integer ages (4 bytes a slot),
which is all that may grow with the capacity C. Beside it the same update of a copy, as the
published code does, which moves C x D numbers.

    python benchmarks/write_cost_is_flat_in_capacity.py torch --slots 16384 1048576
"""

from typing import Any

from _grid import Grid, run
from _harness import milliseconds, ratio, table

FULL = Grid((16_384, 131_072, 1_048_576), (768,), (64,))
QUICK = Grid((16_384, 131_072), (128,), (64,))


def row_of(times: dict[str, list[float]]) -> dict[str, Any]:
    """Return what the table says of one size."""
    return {
        "update ms": milliseconds(times, "update"),
        "copying ms": milliseconds(times, "copying update"),
        "copying / update": ratio(times, "copying update", "update"),
    }


def growth(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the times at each size over those at the smallest capacity of its width and B."""
    smallest: dict[Any, dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: row["slots"]):
        smallest.setdefault((row["width"], row["rows"]), row)
    compared = []
    for row in rows:
        least = smallest[row["width"], row["rows"]]
        compared.append(
            {
                **{key: row[key] for key in ("framework", "slots", "width", "rows")},
                "slots / smallest": row["slots"] / least["slots"],
                "update / smallest": row["update ms"] / least["update ms"],
                "copying / smallest": row["copying ms"] / least["copying ms"],
            }
        )
    return compared


if __name__ == "__main__":
    names = ("update", "copying update")
    # The table, its copy, and a third while it is filled or where the library copies twice.
    found = run(
        str(__doc__), "write_cost", names, row_of, tables=3, matrices=1, full=FULL, quick=QUICK
    )
    if found:
        print(table(growth(found)))
