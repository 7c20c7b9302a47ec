"""Measured results: a line of JSON for each run, added when it ends."""

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .methods import METHODS
from .tasks import TASKS
from .towers import TOWERS
from .training import Run

KEPT = Path(__file__).parent / "results.jsonl"  # shown in the documentation


def name_of(run: Run | dict[str, Any]) -> str:
    """Return what identifies a run, or its result."""
    given = run._asdict() if isinstance(run, Run) else run
    return json.dumps([given[key] for key in Run._fields], sort_keys=True)


def read_runs(path: Path) -> list[Run]:
    """Return the runs of a file, a line of JSON for each, with all fields of Run and no others."""
    return [
        _run_of(line, f"{path}, line {number}")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if line.strip()
    ]


def _run_of(line: str, where: str) -> Run:
    try:
        given = json.loads(line)
    except json.JSONDecodeError as error:
        raise SystemExit(f"{where} is no JSON: {error}.") from error
    if not isinstance(given, dict) or given.keys() != set(Run._fields):
        raise SystemExit(f"{where} is {line}: expected an object of {list(Run._fields)}.")
    run = Run(**given)
    known = (("task", TASKS), ("towers", TOWERS), ("method", METHODS))
    for name, names in known:
        if given[name] not in names:
            raise SystemExit(f"{where} has {name} {given[name]!r}: expected one of {list(names)}.")
    return run


def read(*paths: Path) -> list[dict[str, Any]]:
    """Return every result, the last of each run."""
    return list({name_of(row): row for path in paths for row in read_lines(path)}.values())


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file that may be missing; a truncated line is left out."""
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


def add(path: Path, result: dict[str, Any]) -> None:
    """Add a line, under a lock, so several processes may; end a truncated line before it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed
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
