"""What was measured: a line of JSON for each run, added as it ends."""

import json
import os
from pathlib import Path
from typing import Any

from .training import Run


def name_of(run: Run | dict[str, Any]) -> str:
    """Return what tells a run, or a result of one, from all others."""
    given = run._asdict() if isinstance(run, Run) else run
    return json.dumps([given[key] for key in Run._fields], sort_keys=True)


def read(path: Path) -> list[dict[str, Any]]:
    """Return every result; a line that was cut short is left out."""
    found = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[name_of(row)] = row
    return list(found.values())


def add(path: Path, result: dict[str, Any]) -> None:
    """Add a line, in one write: so several processes may."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, (json.dumps(result) + "\n").encode())
    finally:
        os.close(file)
