"""What is to be measured on a device, the most telling first, and where the results are kept."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from _harness import RESULTS

KEPT = RESULTS / "a_step_on_a_device.jsonl"
SLOTS, WIDTHS = (131_072, 1_048_576, 8_388_608), (128, 768)
ROWS = (64, 512, 8, 4_096)  # in this order
HUGE = 4_000_000  # caches of more slots come after the others
STORAGES = ("float32", "bfloat16", "int8")
PRODUCTS = ("float32", "tf32", "bfloat16")
MODES = ("graph", "eager", "compiled")
SAME = (
    *("device", "framework", "slots", "width", "rows"),
    *("what", "storage", "loss", "mode", "fused"),
)
BYTES = {"float32": 4, "tf32": 4, "bfloat16": 2, "int8": 1}


class Size(NamedTuple):
    """A cache of `slots` rows of `width` numbers, and `rows` queries."""

    slots: int
    width: int
    rows: int


class Job(NamedTuple):
    """One thing to measure.

    what:    "product", the bare product of queries and table; "read", the time to read the table
             once; or "step"
    storage: the dtype of the table; of a product also "tf32"
    loss:    the estimator: "exact_query", with the front door's other defaults, or "paper", with
             those of the published code
    mode:    "eager", "graph" (a CUDA graph) or "compiled"
    """

    what: str
    size: Size
    storage: str
    loss: str = ""
    mode: str = ""
    fused: bool = False

    def record(self) -> dict[str, Any]:
        """Return what identifies this among results."""
        facts = self._asdict()
        return {**facts.pop("size")._asdict(), **facts}


def sizes(slots: Iterable[int], widths: Iterable[int], rows: Sequence[int]) -> list[Size]:
    """Return every combination, the most telling first."""
    every = [Size(s, w, b) for b in rows for s in slots for w in widths]
    place = {each: number for number, each in enumerate(ROWS)}
    return sorted(
        every,
        key=lambda size: (size.slots > HUGE, place.get(size.rows, 9), -size.slots, size.width),
    )


def jobs(every: Sequence[Size], modes: Sequence[str], *, products: bool = True) -> list[Job]:
    """Return what is to be measured at these sizes, the most telling first."""
    fast = [mode for mode in modes if mode != "compiled"]
    found = []
    for size in every:
        if products:
            found += [Job("product", size, storage) for storage in PRODUCTS]
            found += [Job("read", size, storage) for storage in STORAGES]
        found += _steps(size, "exact_query", fast, (False, True))
    for size in every:
        found += _steps(size, "paper", fast, (False,))
    if "compiled" in modes:  # compiling takes longer than all else
        for size in every:
            found += _steps(size, "exact_query", ["compiled"], (False,))
    return found


def _steps(size: Size, loss: str, modes: Iterable[str], fused: Iterable[bool]) -> list[Job]:
    return [
        Job("step", size, storage, loss, mode, each)
        for storage in STORAGES
        for each in fused
        for mode in modes
    ]


def keep(path: Path, record: dict[str, Any]) -> None:
    """Add a result to a file, one line of JSON."""
    path.parent.mkdir(exist_ok=True, parents=True)
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """Return the latest result of each job in each framework on each device."""
    lines = path.read_text().splitlines() if path.exists() else []
    records = [json.loads(line) for line in lines]
    return list({tuple(record[key] for key in SAME): record for record in records}.values())
