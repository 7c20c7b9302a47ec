"""Claim: apart from its tables a step needs almost the same memory at any capacity.

The design allows a few tiles of fixed size (`tile_bytes`), one float per query and block of 128
slots (B x C/128), and passes over the integer ages, but never the B x C score matrix. The promise:
at most 64 MB (2**20 bytes each, here and below) at 1,048,576 slots and 64 queries.

    python benchmarks/memory_of_a_step_is_flat_in_capacity.py --framework torch --slots 16384

"counted" is the library's own count for one step after the warm-up, beyond what was held before:
NumPy's allocations by tracemalloc; PyTorch's by its profiler, as the highest running sum of
allocations less frees; JAX's by what the compiler plans: temporaries, and results without a donated
buffer. TensorFlow gives no such count on a CPU.

"resident" is the rise of the whole process's peak resident memory over three more steps, for
TensorFlow the only measure. It is coarse. It counts whole pages, which are 2 MB for large arrays on
some systems, and what libraries allocate outside their framework, such as packed matrices and
the first use of a thread's stack. It omits what an allocator kept since the warm-up and
reuses. To keep that small, each size runs in a separate process, whose allocator returns all
blocks above 64 KB at once. It also includes what a compiler's plan does not, such as a sort's
buffer. Linux only.

The larger of the two decides whether the promise holds.
"""

import argparse
import ctypes
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _grid import FRAMEWORKS, SAME, VOCABULARY, candidates_of
from _harness import save, table

MB = 2**20
PROMISED_MB, PROMISED_SLOTS, PROMISED_ROWS = 64, 1_048_576, 64
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def resident_rise(step: Callable[[], Any], times: int = 3) -> int | None:
    """Return how many bytes some steps add to the peak of resident memory; None if unknown."""
    status = Path("/proc/self/status")

    def kilobytes(field: str) -> int:
        lines = status.read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))

    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from now on
    except (OSError, AttributeError):
        return None
    before = kilobytes("VmRSS")
    for _ in range(times):
        step()
    return 1024 * max(0, kilobytes("VmHWM") - before)


def measure(framework: str, slots: int, width: int, rows: int) -> dict[str, Any]:
    """Return one row of the table; call this once per process."""
    step = candidates_of(framework, ("step",), slots, width, rows)["step"]
    for _ in range(3):
        step()
    resident = resident_rise(step)
    count = getattr(importlib.import_module(f"_steps_{framework}"), "bytes_of_a_step", None)
    counted = None if count is None else count(step, slots, width, rows, VOCABULARY)
    larger = max((each for each in (counted, resident) if each is not None), default=None)
    return {
        "framework": framework,
        "slots": slots,
        "width": width,
        "rows": rows,
        "counted MB": None if counted is None else counted / MB,
        "resident MB": None if resident is None else resident / MB,
        "larger MB": None if larger is None else larger / MB,
        "B x C/128 MB": 4 * rows * slots / 128 / MB,
        "ages MB": 4 * slots / MB,
        "score matrix MB": 4 * rows * slots / MB,
        "table MB": 4 * slots * width / MB,
    }


def measure_apart(framework: str, slots: int, width: int, rows: int) -> dict[str, Any]:
    """Run `measure` in a fresh process."""
    size = [str(number) for number in (slots, width, rows)]
    done = subprocess.run(  # noqa: S603 - this script itself
        [sys.executable, __file__, "--framework", framework, "--one", *size],
        env={**os.environ, **ALLOCATOR},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def verdict(row: dict[str, Any]) -> str:
    """Return whether a row keeps the promise: unknown on other systems, and not at larger sizes."""
    if row["larger MB"] is None:
        return "?"
    if row["slots"] > PROMISED_SLOTS or row["rows"] > PROMISED_ROWS:
        return "-"
    return "yes" if row["larger MB"] <= PROMISED_MB else "no"


def main() -> None:
    """Measure each framework and capacity in a separate process."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", maxsplit=1)[0])
    parser.add_argument("--framework", choices=FRAMEWORKS, nargs="+", default=FRAMEWORKS)
    parser.add_argument("--slots", type=int, nargs="+")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--quick", action="store_true", help="two small capacities")
    parser.add_argument("--one", type=int, nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.framework[0], *options.one)))
        return
    sizes = (16_384, 131_072) if options.quick else (16_384, 131_072, PROMISED_SLOTS)
    found = []
    for framework in options.framework:
        for slots in options.slots or sizes:
            row = measure_apart(framework, slots, options.width, options.rows)
            found.append({**row, f"at most {PROMISED_MB} MB": verdict(row)})
            path = save("memory", found[-1:], SAME)
    print(table(found))
    print("written to", path)


if __name__ == "__main__":
    main()
