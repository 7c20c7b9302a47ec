"""One framework over a grid of sizes: the command line shared by the timing benchmarks."""

import argparse
import gc
import importlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from _harness import interleaved, save, table

FRAMEWORKS = ("numpy", "torch", "tensorflow", "jax")
SAME = ("framework", "slots", "width", "rows")
VOCABULARY = 1_000


class Grid(NamedTuple):
    """The sizes of a benchmark: every combination of capacities C, widths D and queries B."""

    slots: tuple[int, ...]
    width: tuple[int, ...]
    rows: tuple[int, ...]


FULL = Grid((16_384, 131_072, 1_048_576), (128, 768), (8, 64, 512))
QUICK = Grid((16_384, 131_072), (128,), (8, 64))


def candidates_of(
    framework: str, names: Sequence[str], slots: int, width: int, rows: int
) -> dict[str, Callable[[], Any]]:
    """Return the named candidates of a framework; nothing else is built."""
    module = importlib.import_module(f"_steps_{framework}")
    makers = module.Candidates(slots, width, rows, VOCABULARY)
    return {name: getattr(makers, name.replace(" ", "_"))() for name in names}


def run(
    claim: str,
    file: str,
    names: Sequence[str],
    row_of: Callable[[dict[str, list[float]]], dict[str, Any]],
    *,
    tables: float,
    matrices: float = 0,
    full: Grid = FULL,
    quick: Grid = QUICK,
) -> list[dict[str, Any]]:
    """Measure the sizes given on the command line, print a table, write and return its rows.

    names:    the candidates to measure side by side
    row_of:   their times -> a row of the table
    tables:   memory needed, in tables of C x D float32 …
    matrices: … and in matrices of B x C float32, to leave out sizes that do not fit
    """
    parser = argparse.ArgumentParser(description=claim.split("\n", maxsplit=1)[0])
    parser.add_argument("framework", choices=FRAMEWORKS)
    for name in Grid._fields:
        parser.add_argument(f"--{name}", type=int, nargs="+", help="instead of the grid's")
    parser.add_argument("--quick", action="store_true", help="a small grid, for a first look")
    parser.add_argument("--rounds", type=int, default=11, help="at most, and at least 3")
    parser.add_argument("--seconds", type=float, help="start no round of a size after this time")
    parser.add_argument("--memory-gb", type=float, default=16.0, help="skip larger sizes")
    options = parser.parse_args()
    grid = quick if options.quick else full
    seconds = options.seconds or (3.0 if options.quick else 30.0)
    found = []
    for slots, width, rows in itertools.product(
        *(getattr(options, name) or getattr(grid, name) for name in Grid._fields)
    ):
        needed = 4e-9 * slots * (tables * width + matrices * rows)
        size = {"slots": slots, "width": width, "rows": rows}
        if needed > options.memory_gb:
            print(f"skipped {size}: about {needed:.1f} GB, over --memory-gb {options.memory_gb:g}")
            continue
        candidates = candidates_of(options.framework, names, **size)
        times = interleaved(candidates, rounds=options.rounds, seconds=seconds)
        candidates.clear()
        gc.collect()  # the next size needs this memory
        rounds = len(times[names[0]])
        found.append({"framework": options.framework, **size, **row_of(times), "rounds": rounds})
        path = save(f"{file}_{options.framework}", found[-1:], SAME)
    if found:
        print(table(found))
        print("written to", path)
    return found
