"""The comparison of MiniLM at equal device time: what is run, in which order, and the report.

Every way of training that embeds as many pairs at once has the same budget: the time that in-batch
training takes for some steps. Its rate is found by climbing: from a first guess to half and twice
the best so far, by MRR on validation queries with seed 0, until the best lies between two others.
Then further seeds are run at this rate. Test queries have no influence on it.
"""

import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from tournament.choosing import Row, at, score
from tournament.report import ratio, spread

PARTS = (0.25, 0.5, 0.75, 1.0)  # of the budget
FARTHEST = 8  # times the first rate, or a share of it: no rate is beyond
TITLES = {
    "in-batch": "in-batch negatives",
    "gradient-caching": "gradient caching",
    "cache": "cache",
}
HEADS = ("", "rate", "seeds", "steps", "ms a step", "1/4", "1/2", "3/4", "the end")


class Contest(NamedTuple):
    """A way of training, whose rate is to be found.

    at_once: pairs that are embedded at once, and learned from; gradient caching's batch is larger
    """

    method: str
    at_once: int
    batch: int
    options: dict[str, Any]

    def holds(self, row: Row) -> bool:
        """Return whether a result is of this contest."""
        return all(row[key] == value for key, value in self._asdict().items())


class Plan(NamedTuple):
    """What to compare.

    contests: the most telling first
    steps:    in-batch steps that take the budget
    rate:     the first to be tried with `batch`
    """

    contests: tuple[Contest, ...]
    steps: int
    batch: int
    rate: float
    seeds: tuple[int, ...]

    def first_rate(self, contest: Contest) -> float:
        """Return a climb's first rate: twice as high for a batch four times as large."""
        times = contest.batch // self.batch
        return self.rate * 2 ** ((times.bit_length() - 1) // 2)

    def part(self, at_once: Sequence[int]) -> "Plan":
        """Return the plan for some numbers of pairs at once."""
        known = {each.at_once for each in self.contests}
        if not set(at_once) <= known:
            raise SystemExit(f"--at-once is {list(at_once)}: expected some of {sorted(known)}.")
        contests = (each for each in self.contests if each.at_once in at_once)
        return self._replace(contests=tuple(contests))


class Left(NamedTuple):
    """A run that has no result: round 0 is a contest's first rate, 1 other rates, 2 more seeds."""

    round: int
    contest: Contest
    rate: float
    seed: int


def _contests(*batches: tuple[str, int, int], **options: Any) -> tuple[Contest, ...]:
    """Return contests from methods, batches and pairs at once; `options` are the cache's."""
    all_options = {"cache": options, "in-batch": {}}
    return tuple(
        Contest(method, at_once, batch, all_options.get(method, {"chunk": at_once}))
        for method, batch, at_once in batches
    )


FULL = Plan(
    _contests(
        ("in-batch", 64, 64),
        ("cache", 64, 64),
        ("gradient-caching", 256, 64),
        ("in-batch", 512, 512),
        ("cache", 512, 512),
        ("gradient-caching", 2_048, 512),
        ("gradient-caching", 1_024, 64),
    ),
    steps=2_000,
    batch=64,
    rate=2e-4,
    seeds=(0, 1, 2),
)
TINY = Plan(
    _contests(
        ("in-batch", 8, 8),
        ("cache", 8, 8),
        ("gradient-caching", 32, 8),
        ("in-batch", 16, 16),
        ("cache", 16, 16),
        cache_size=64,
    ),
    steps=60,
    batch=8,
    rate=4e-3,
    seeds=(0, 1),
)


def left(plan: Plan, rows: Sequence[Row]) -> list[Left]:
    """Return the runs that are known to be missing, the next first."""
    found = [run for contest in plan.contests for run in _left_of(contest, plan, rows)]
    return sorted(found, key=lambda run: run.round)  # stable: contests stay in order


def _left_of(contest: Contest, plan: Plan, rows: Sequence[Row]) -> Iterator[Left]:
    best = chosen(contest, rows)
    if best is None:
        yield Left(0, contest, plan.first_rate(contest), 0)
        return
    mine = [row for row in rows if contest.holds(row)]
    done = {(row["rate"], row["seed"]) for row in mine}
    beside = [
        rate
        for rate in (best["rate"] / 2, best["rate"] * 2)
        if (rate, 0) not in done and 1 / FARTHEST <= rate / plan.first_rate(contest) <= FARTHEST
    ]
    for rate in beside:
        yield Left(1, contest, rate, 0)
    for seed in plan.seeds:
        if not beside and (best["rate"], seed) not in done:
            yield Left(2, contest, best["rate"], seed)


def seconds_left(plan: Plan, rows: Sequence[Row], budgets: dict[int, float]) -> float:
    """Return the seconds of training that are left at least; more rates may be tried."""
    more_seeds = len(plan.seeds) - 1
    to_come = {0: 2 + more_seeds, 1: more_seeds}  # by the round that a contest is in
    total = 0.0
    for contest in plan.contests:
        rounds = [run.round for run in _left_of(contest, plan, rows)]
        runs = len(rounds) + (to_come.get(rounds[0], 0) if rounds else 0)
        total += budgets[contest.at_once] * runs
    return total


def chosen(contest: Contest, rows: Iterable[Row]) -> Row | None:
    """Return the result of seed 0 with the best MRR on validation; None if there is none."""
    mine = (row for row in rows if contest.holds(row) and row["seed"] == 0)
    return max(mine, key=score, default=None)


def arenas(rows: Iterable[Row]) -> dict[tuple[Any, ...], list[Row]]:
    """Return what may be compared: the results of one device, task, precision and budget."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    keys = ("machine", "task", "precision", "at_once", "seconds")
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return found


def shown(rows: Sequence[Row]) -> list[list[Row]]:
    """Return for each contest of an arena the results of all seeds at its chosen rate."""
    contests = {(row["method"], row["batch"]): contest_of(row) for row in rows}
    found = []
    for contest in contests.values():
        if best := chosen(contest, rows):
            mine = [row for row in rows if contest.holds(row) and row["rate"] == best["rate"]]
            found.append(sorted(mine, key=lambda row: row["seed"]))
    return sorted(found, key=lambda runs: (list(TITLES).index(runs[0]["method"]), runs[0]["batch"]))


def contest_of(row: Row) -> Contest:
    """Return the contest that a result is of."""
    return Contest(*(row[key] for key in Contest._fields))


def report(rows: Iterable[Row]) -> str:
    """Return a table in Markdown for each arena.

    A rate with a star is the smallest or largest that was tried: a better one may lie beyond.
    """
    return "\n\n".join(_section(*each) for each in arenas(rows).items())


def _section(name: tuple[Any, ...], rows: list[Row]) -> str:
    machine, task, precision, at_once, seconds = name
    found = shown(rows)
    lines = [HEADS, ("---",) * len(HEADS), *(_line(runs, rows) for runs in found)]
    start = at(rows[0], 0.0)
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    section = (
        f"**{machine}, {task}, {at_once:,} pairs at once**: {seconds:g} seconds of training, "
        f"{precision}. Test MRR, {start['test MRR']:.3f} at the start:\n\n{table}"
    )
    others = [runs for runs in found if runs[0]["method"] != "cache"]
    best = max(others, key=lambda runs: score(runs[0]), default=[])
    for runs in found:
        if best and runs not in others:
            ratios = ", ".join(ratio(runs, best, part) for part in PARTS)
            section += f"\n\nThe cache over {label(best[0])}, the best on validation: {ratios}."
    return section


def _line(runs: list[Row], rows: list[Row]) -> tuple[str, ...]:
    ends = [row["curve"][-1] for row in runs]
    rates = {row["rate"] for row in rows if contest_of(row).holds(runs[0])}
    steps = sorted(end["steps"] for end in ends)
    step = statistics.mean(end["seconds"] / end["steps"] for end in ends)
    return (
        label(runs[0]),
        f"{runs[0]['rate']:g}" + "*" * (runs[0]["rate"] in {min(rates), max(rates)}),
        str(len(runs)),
        f"{steps[0]:,}" + f" to {steps[-1]:,}" * (steps[0] < steps[-1]),
        f"{1e3 * step:.1f}",
        *(spread(runs, part) for part in PARTS),
    )


def label(row: Row) -> str:
    """Return a way of training in words."""
    chunks = f" in chunks of {row['at_once']:,}" * (row["batch"] > row["at_once"])
    return f"{TITLES[row['method']]}, {row['batch']:,}{chunks}"
