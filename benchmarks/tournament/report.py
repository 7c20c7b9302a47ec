"""The tournament's results, as a table in Markdown for each task."""

import json
import statistics
from collections.abc import Sequence

from .choosing import SHOWN_PARTS, Row, all_seeds, arenas, at, best_baseline, choose, setting_of
from .methods import METHODS

HEADS = (
    *("method", "batch", "rate", "seeds"),
    *("MRR at 1/4", "at 1/2", "at the end", "processor seconds"),
    *("over the baseline chosen by its end", "over the best baseline at that part"),
)


def report(rows: Sequence[Row]) -> str:
    """Return a section for each task, towers and budget.

    A method's batch and rate are those that were best on validation at the end, with seed 0. Its
    figures are test MRR, mean (lowest to highest) of all seeds that were run with these. A rate
    with a star is the smallest or the largest tried with its batch: a better one may lie beyond.

    The two last columns, at 1/4, 1/2 and the end: the method's MRR over that of a baseline
    (in-batch or gradient caching, any batch, rate and options), each the mean of the seeds that
    both were run with. The first is the baseline that is best on validation at the end, the second
    the one that is best on validation at that part.
    """
    return "\n\n".join(
        _section(name, arena) for name, arena in arenas(rows).items() if choose(arena)
    )


def _section(name: tuple[str, str, int], rows: list[Row]) -> str:
    task, towers, budget = name
    strict = {part: best_baseline(rows, part) for part in SHOWN_PARTS}
    chosen = sorted(choose(rows), key=_place)
    lines = [HEADS, ("---",) * len(HEADS), *(_line(rows, row, strict) for row in chosen)]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    names = ", ".join(
        f"{_label(row)} batch {row['batch']} rate {row['rate']:g} at {part:g} "
        f"(seeds: {len(all_seeds(rows, row))})"
        for part, row in strict.items()
        if row
    )
    return (
        f"### {task}, {towers} towers, {budget:,} encoder calls\n\n{table}\n\n"
        f"The best baseline at each part: {names or 'none was run'}."
    )


def _line(rows: list[Row], chosen: Row, strict: dict[float, Row | None]) -> tuple[str, ...]:
    runs = all_seeds(rows, chosen)
    seconds = statistics.mean(row["curve"][-1]["seconds"] for row in runs)
    return (
        _label(chosen),
        f"{chosen['batch']:,}",
        f"{chosen['rate']:g}" + "*" * _at_edge(rows, chosen),
        str(len(runs)),
        *(spread(runs, part) for part in SHOWN_PARTS),
        f"{seconds:.0f}",
        *(
            ", ".join(
                ratio(runs, all_seeds(rows, row) if row else [], part)
                for part, row in baselines.items()
            )
            for baselines in (dict.fromkeys(SHOWN_PARTS, strict[1.0]), strict)
        ),
    )


def _at_edge(rows: list[Row], chosen: Row) -> bool:
    alike = (row for row in rows if setting_of({**chosen, "rate": row["rate"]}) == setting_of(row))
    rates = {row["rate"] for row in alike}
    return chosen["rate"] in {min(rates), max(rates)}


def _label(row: Row) -> str:
    return row["method"] + (f" `{json.dumps(row['options'])}`" if row["options"] else "")


def _place(row: Row) -> tuple[int, str]:
    return list(METHODS).index(row["method"]), json.dumps(row["options"], sort_keys=True)


def test_mrr(runs: list[Row], part: float) -> dict[int, float]:
    """Return the test MRR at a part of the budget by seed."""
    points = {row["seed"]: at(row, part) for row in runs}
    return {seed: point["test MRR"] for seed, point in points.items() if point}


def spread(runs: list[Row], part: float) -> str:
    """Return the mean test MRR at a part of the budget, and the lowest and highest of the seeds."""
    found = list(test_mrr(runs, part).values())
    if not found:
        return "-"
    mean = f"{statistics.mean(found):.3f}"
    return f"{mean} ({min(found):.3f} to {max(found):.3f})" if len(found) > 1 else mean


def ratio(runs: list[Row], others: list[Row], part: float) -> str:
    """Return the test MRR at a part of the budget over that of others, of the seeds of both."""
    ours, theirs = test_mrr(runs, part), test_mrr(others, part)
    # Runs with one seed share initial weights and the order of pairs: common effects cancel.
    both = ours.keys() & theirs.keys()
    if not both:
        return "-"
    return f"{sum(ours[seed] for seed in both) / sum(theirs[seed] for seed in both):.3f}"
