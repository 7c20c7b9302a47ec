"""Timing side by side: every candidate in turn, round after round, so that drift hits all alike."""

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def interleaved(
    candidates: dict[str, Callable[[], Any]], *, rounds: int, baseline: str
) -> dict[str, dict[str, float]]:
    """Time each candidate once a round, after one round of warm-up.

    Returns by name: median seconds, and the median, least and largest ratio to the baseline of the
    same round. A candidate must not return before its work is done.
    """
    for run in candidates.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    rows = {}
    for name, times in seconds.items():
        ratios = [mine / base for mine, base in zip(times, seconds[baseline], strict=True)]
        rows[name] = {
            "seconds": statistics.median(times),
            "ratio": statistics.median(ratios),
            "least": min(ratios),
            "largest": max(ratios),
        }
    return rows


def handler_of(negcache: Any, slots: int, width: int, id_dtype: Any, dtype: Any) -> Any:
    """Return an empty handler of any adapter, for items that are known by an id."""
    specs = {
        "id": negcache.FieldSpec((), id_dtype),
        "embedding": negcache.FieldSpec((width,), dtype),
    }
    return negcache.CacheLossHandler(
        negcache.CacheManager(specs, slots),
        negcache.CacheClassificationLoss("embedding", ("id",)),
        embedding_key="embedding",
        data_keys=("id",),
    )


def table(rows: list[dict[str, Any]]) -> str:
    """Return rows of equal keys as an aligned table."""
    heads = list(rows[0])
    cells = [heads, *[[_cell(row[head]) for head in heads] for row in rows]]
    widths = [max(len(line[column]) for line in cells) for column in range(len(heads))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in cells
    )


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def save(name: str, rows: list[dict[str, Any]]) -> Path:
    """Write rows as JSON, with the machine they were measured on."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    machine = {"platform": platform.platform(), "processor": platform.processor()}
    path.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    return path
