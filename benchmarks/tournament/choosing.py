"""Which batch and rate represent each method: the best on validation, by seed 0.

Test queries have no influence on it.
"""

from collections.abc import Iterable
from typing import Any

from .results import name_of

Row = dict[str, Any]

BASELINES = ("in-batch", "gradient-caching")
SHOWN_PARTS = (0.25, 0.5, 1.0)  # of the budget


def at(row: Row, part: float) -> dict[str, float] | None:
    """Return a result's point at a part of its budget, or None if it was not kept."""
    return next((point for point in row["curve"] if point["part"] == part), None)


def score(row: Row, part: float = 1.0) -> float:
    """Return the MRR on validation at a part of the budget; below all others if not kept."""
    point = at(row, part)
    return -1.0 if point is None else point["validation MRR"]


def choose(rows: Iterable[Row], part: float = 1.0) -> list[Row]:
    """Return, for each contest, the result of seed 0 with the best validation MRR at a part."""
    best: dict[str, Row] = {}
    for row in rows:
        if row["seed"] == 0:
            name = contest_of(row)
            if name not in best or score(row, part) > score(best[name], part):
                best[name] = row
    return [best[name] for name in sorted(best)]


def best_baseline(rows: Iterable[Row], part: float) -> Row | None:
    """Return the baseline's result of seed 0 that is best on validation at a part of the budget."""
    found = [row for row in rows if row["method"] in BASELINES and row["seed"] == 0]
    return max(found, key=lambda row: score(row, part), default=None)


def all_seeds(rows: Iterable[Row], chosen: Row) -> list[Row]:
    """Return the results of all seeds with the setting of `chosen`, in order."""
    wanted = setting_of(chosen)
    return sorted((row for row in rows if setting_of(row) == wanted), key=lambda row: row["seed"])


def needed(rows: Iterable[Row]) -> list[Row]:
    """Return results of seed 0, one for each setting that a report shows or compares with."""
    found: dict[str, Row] = {}
    for arena in arenas(rows).values():
        strict = (best_baseline(arena, part) for part in SHOWN_PARTS)
        for row in (*choose(arena), *(row for row in strict if row)):
            found[setting_of(row)] = row
    return list(found.values())


def arenas(rows: Iterable[Row]) -> dict[tuple[str, str, int], list[Row]]:
    """Return what may be compared: the results of each task, towers and budget."""
    found: dict[tuple[str, str, int], list[Row]] = {}
    for row in rows:
        found.setdefault((row["task"], row["towers"], row["budget"]), []).append(row)
    return dict(sorted(found.items()))


def contest_of(row: Row) -> str:
    """Return what a row shares with those that it is chosen among."""
    return name_of({**row, "batch": None, "rate": None, "seed": None})


def setting_of(row: Row) -> str:
    """Return what identifies a row, apart from its seed."""
    return name_of({**row, "seed": None})
