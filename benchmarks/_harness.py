"""Timing side by side: candidates take turns, round after round, so that drift affects all."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
LEAST_ROUNDS = 3


def interleaved(
    candidates: dict[str, Callable[[], Any]],
    *,
    rounds: int,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
    warm: bool = False,
) -> dict[str, list[float]]:
    """Time each candidate once a round; return the seconds by name.

    rounds:  at most so many, and at least three
    seconds: no further round begins after so long
    warm:    that each has run before; else there is a round of warm-up
    clock:   what a candidate is timed by; `time.process_time` where others use the machine

    A candidate must not return before its work is done.
    """
    for run in () if warm else candidates.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    begin = time.perf_counter()
    for done in range(max(rounds, LEAST_ROUNDS)):
        if done >= LEAST_ROUNDS and time.perf_counter() - begin > seconds:
            break
        for name, run in candidates.items():
            start = clock()
            run()
            times[name].append(clock() - start)
    return times


def milliseconds(times: dict[str, list[float]], name: str) -> float:
    """Return a candidate's median time."""
    return 1e3 * statistics.median(times[name])


def ratios(times: dict[str, list[float]], name: str, baseline: str) -> list[float]:
    """Return a candidate's times over the baseline's, round by round."""
    return [mine / base for mine, base in zip(times[name], times[baseline], strict=True)]


def ratio(times: dict[str, list[float]], name: str, baseline: str) -> float:
    """Return the median of `ratios`."""
    return statistics.median(ratios(times, name, baseline))


def handler_of(negcache: Any, slots: int, width: int, id_dtype: Any, dtype: Any) -> Any:
    """Return an empty handler of any adapter, for items identified by an id."""
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


def result_of(handler: Any, network: Any, query: Any, positive: Any, features: Any) -> Any:
    """Return the result of one step's loss for `handler` to commit."""
    retrieval = handler.retrieve(query, features)
    negative = network(retrieval.features)
    return handler.compute_loss(query, positive, negative, retrieval)


def copied_update(handler: Any, result: Any, positive: Any, features: Any) -> Any:
    """Update a copy of a handler's cache, as the published code does: it copies every table."""
    (refresh,) = (
        {
            "updated_item_data": result.updated_item_data[name],
            "updated_item_indices": slots,
            "updated_item_mask": result.updated_item_mask[name],
        }
        for name, slots in result.updated_item_indices.items()
    )
    return handler.cache_manager.update_cache(
        handler.cache, new_items={"embedding": positive, **features}, **refresh
    )


def table(rows: list[dict[str, Any]]) -> str:
    """Return rows with equal keys as an aligned table."""
    heads = list(rows[0])
    cells = [heads, *[[_cell(row[head]) for head in heads] for row in rows]]
    widths = [max(len(line[column]) for line in cells) for column in range(len(heads))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in cells
    )


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def save(name: str, rows: list[dict[str, Any]], same: Sequence[str] = ()) -> Path:
    """Write rows as JSON, with the machine they were measured on.

    same: keys that identify a row. Earlier rows from this machine stay, unless a new one has equal
          values there; rows from another machine are never mixed with these.
    """
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    machine = {
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
    }
    kept = []
    if same and path.exists():
        earlier = json.loads(path.read_text())
        names = [[row[key] for key in same] for row in rows]
        if earlier["machine"] == machine:
            kept = [row for row in earlier["rows"] if [row.get(key) for key in same] not in names]
    every = kept + rows
    if same:
        every.sort(key=lambda row: [row[key] for key in same])
    path.write_text(json.dumps({"machine": machine, "rows": every}, indent=1) + "\n")
    return path
