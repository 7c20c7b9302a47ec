"""Which batch and rate each method is shown with: the best on validation, at the end, by seed 0."""

from typing import Any

from .results import name_of

CONTEST = ("task", "towers", "method", "budget", "options")


def choose(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return of each contest the result with the best validation MRR among those of seed 0."""
    best: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["seed"] == 0:
            name = contest_of(row)
            if name not in best or score(row) > score(best[name]):
                best[name] = row
    return [best[name] for name in sorted(best)]


def contest_of(row: dict[str, Any]) -> str:
    """Return what a row has in common with those that it is chosen among."""
    return name_of({**row, "batch": None, "rate": None, "seed": None})


def score(row: dict[str, Any]) -> float:
    """Return the last MRR on validation."""
    return row["curve"][-1]["validation MRR"]
