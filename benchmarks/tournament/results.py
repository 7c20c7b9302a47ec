"""What was measured: a line of JSON for each run, added as it ends."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .training import Run

KEPT = Path(__file__).parent / "results.jsonl"  # what the documentation shows


def name_of(run: Run | dict[str, Any]) -> str:
    """Return what tells a run, or a result of one, from all others."""
    given = run._asdict() if isinstance(run, Run) else run
    return json.dumps([given[key] for key in Run._fields], sort_keys=True)


def read(*paths: Path) -> list[dict[str, Any]]:
    """Return every result, the last of each run; a line that was cut short is left out."""
    found = {}
    for path in paths:
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            found[name_of(row)] = row
    return list(found.values())


def add(path: Path, result: dict[str, Any]) -> None:
    """Add a line, in one write: so several processes may. What was cut short before is ended."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(file).st_size
        cut = size > 0 and os.pread(file, 1, size - 1) != b"\n"
        os.write(file, ("\n" * cut + json.dumps(result) + "\n").encode())
    finally:
        os.close(file)


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write results compactly and in order of their names: figures with 5 decimals."""
    lines = [json.dumps(_rounded(row), separators=(",", ":")) for row in sorted(rows, key=name_of)]
    part = path.with_suffix(".part")
    part.write_text("".join(line + "\n" for line in lines))
    part.replace(path)


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    curve = [{key: round(value, 5) for key, value in point.items()} for point in row["curve"]]
    return {**row, "curve": curve, "seconds": round(row["seconds"], 1)}
