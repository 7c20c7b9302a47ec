"""Claim: a cache stored in bfloat16 or float16 halves the time of a step.

It halves the memory everywhere. Time is different: without half-precision arithmetic every tile is
converted to float32 before it is scored, which may cost more than the memory traffic it saves. The
script reports where the claim holds: a step takes at most 0.6 of the time of the same step on
float32 rows. It also measures the bare float32 product q @ cache.T.

    python benchmarks/reduced_precision_halves_the_time.py torch --slots 131072 --width 768
"""

from typing import Any

from _grid import run
from _harness import milliseconds, ratio

HALVES = ("bfloat16", "float16")
AT_MOST = 0.6


def row_of(times: dict[str, list[float]]) -> dict[str, Any]:
    """Return the table's row for one size."""
    row: dict[str, Any] = {
        "step ms": milliseconds(times, "step"),
        "step / product": ratio(times, "step", "product"),
    }
    for half in HALVES:
        of_step = ratio(times, f"{half} step", "step")
        row[f"{half} / step"] = of_step
        row[f"{half} / product"] = ratio(times, f"{half} step", "product")
        row[f"{half} holds"] = "yes" if of_step <= AT_MOST else "no"
    return row


if __name__ == "__main__":
    names = ("product", "step", *(f"{half} step" for half in HALVES))
    # float32 rows, two halves, perhaps the product's own table, and one while they are filled.
    found = run(str(__doc__), "reduced_precision", names, row_of, tables=4, matrices=1)
    for half in HALVES:
        held = sum(row[f"{half} holds"] == "yes" for row in found)
        print(f"{half}: the claim (at most {AT_MOST} of the time) holds at {held} of {len(found)}.")
