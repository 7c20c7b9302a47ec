"""Claim: no public verb takes time or memory that grows with the square of its rows or slots.

All verbs run at C slots and n rows, then, each time in a fresh process, with twice the rows and
with twice the slots. A linear verb takes at most about twice as long. One that compares rows with
rows pair by pair takes four times as long, and one that compares rows with slots makes n passes
over the cache. Verbs that score (`step`, `retrieve`, `evaluate`, which get a hundredth of the rows)
take the time of a product of queries and cache, and must not hold its result.

    python benchmarks/no_verb_is_quadratic.py torch --slots 1000000 --rows 10000

"seconds" is processor time, all cores together, the least of three calls, so that other programs
matter little. "extra MB" (2**20 bytes) is how much one call adds to the peak of the process's
resident memory, after a first call; Linux only. It includes the copies of a verb that copies the
tables, as `update_cache` does.
"""

import argparse
import gc
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from _harness import save, table
from memory_of_a_step_is_flat_in_capacity import ALLOCATOR, MB, resident_rise

PACKAGES = {"numpy": "negcache_core", "torch": "negcache_torch"}
WIDTH = 64
SCORING = 100  # one of this many rows, for verbs that score every row against every slot
LONG = 10.0  # seconds after which a call is not repeated
SHORT = 0.01  # seconds below which a ratio means nothing
MOST_GROWTH = 3.0
"""Of the time, when rows or slots double: between a linear verb's 2 and a quadratic one's 4."""


class Sizes(NamedTuple):
    """Slots of the cache, and rows of a call."""

    slots: int
    rows: int


class Problem:
    """A full cache of items with ids, and a batch of rows, half of which are in the cache."""

    def __init__(self, framework: str, sizes: Sizes) -> None:
        self.negcache = importlib.import_module(PACKAGES[framework])
        self.framework, self.sizes = framework, sizes
        rng = np.random.default_rng(0)
        self.table = rng.standard_normal((sizes.slots, WIDTH), np.float32)
        ids = np.arange(sizes.slots)
        age = rng.integers(0, 1000, sizes.slots).astype(np.int32)
        self.cache = self.negcache.NegativeCache({"id": ids, "embedding": self.table}, age)

    def native(self, array: Any) -> Any:
        """Return an array of the framework."""
        if self.framework == "numpy":
            return array
        return importlib.import_module("torch").as_tensor(array)

    def handler(self, **options: Any) -> Any:
        """Return a handler of the full cache."""
        made = self.negcache.CacheLossHandler(self.manager(**options), self.loss())
        made.restore(self.cache)
        return made

    def manager(self, slots: int | None = None, **options: Any) -> Any:
        """Return a manager of the cache's fields."""
        specs = {
            "id": self.negcache.FieldSpec((), "int64"),
            "embedding": self.negcache.FieldSpec((WIDTH,), "float32"),
        }
        return self.negcache.CacheManager(specs, slots or self.sizes.slots, **options)

    def loss(self) -> Any:
        """Return a loss."""
        return self.negcache.CacheClassificationLoss("embedding", ("id",), scale=0.1, generator=0)

    def network(self, features: Any) -> Any:
        """Embed items by looking up a row."""
        return self.native(self.table)[features["id"] % self.sizes.slots]

    def batch(self, rows: int | None = None) -> tuple[Any, Any, dict[str, Any]]:
        """Return queries, positives and features."""
        rows = self.sizes.rows if rows is None else rows
        ids = np.random.default_rng(1).integers(0, 2 * self.sizes.slots, rows)
        features = {"id": self.native(ids)}
        queries = self.native(np.random.default_rng(2).standard_normal((rows, WIDTH), np.float32))
        return queries, self.network(features), features


Call = Callable[[], Any]


class Verbs:
    """Sets up each verb, by name, and returns the call to measure."""

    def __init__(self, problem: Problem, folder: Path) -> None:
        self.problem, self.path = problem, folder / "cache"
        self.negcache, self.sizes = problem.negcache, problem.sizes
        few = max(1, self.sizes.rows // SCORING)
        self.found: dict[str, Callable[[], Call]] = {
            "update_cache": self.with_handler(self.update),
            "update_cache, unique_key": self.with_handler(self.update, unique_key="id"),
            "IsInCacheFilterFn": self.with_handler(self.filter),
            "prefill": self.with_handler(self.prefill),
            "prefill, unique_key": self.with_handler(self.prefill, unique_key="id"),
            "refresh": self.with_handler(
                lambda handler, *_: handler.refresh(problem.network, self.sizes.rows)
            ),
            "step": self.with_handler(self.step, few),
            "step, unique_key": self.with_handler(self.step, few, unique_key="id"),
            "step, two caches": lambda: self.several(few),
            "retrieve": self.with_handler(
                lambda handler, queries, _, features: handler.retrieve(queries, features), few
            ),
            "evaluate": self.with_handler(
                lambda handler, *batch: handler.evaluate(None, *batch), few
            ),
            "commit": lambda: self.commit(few),
            "save": self.with_handler(lambda handler, *_: handler.save(self.path)),
            "load": self.load,
            "restore": self.with_handler(lambda handler, *_: handler.restore(problem.cache)),
            "restore, resize": self.restore_into_less,
            "resize, there and back": self.with_handler(self.resize),
            "reset": self.with_handler(lambda handler, *_: handler.reset()),
            "evict_nonfinite": self.with_handler(lambda handler, *_: handler.evict_nonfinite()),
            "approximate_top_k": self.top_k,
            "plot_cache": self.with_handler(self.plot),
            "scaling": lambda: self.scaling,
        }
        if problem.framework == "torch":
            self.found["state_dict and back"] = self.with_handler(
                lambda handler, *_: handler.load_state_dict(handler.state_dict())
            )

    def with_handler(
        self, call: Callable[..., Any], rows: int | None = None, **options: Any
    ) -> Callable[[], Call]:
        """Return a function that makes a full handler and a batch, for call(handler, *batch)."""

        def set_up() -> Call:
            handler, batch = self.problem.handler(**options), self.problem.batch(rows)
            return lambda: call(handler, *batch)

        return set_up

    def step(self, handler: Any, *batch: Any) -> Any:
        """Run a step."""
        return handler.update_cache_and_compute_loss(self.problem.network, *batch)

    def update(self, handler: Any, queries: Any, items: Any, features: Any) -> Any:
        """Update a copy of the cache."""
        del queries
        new_items = {"embedding": items, **features}
        return handler.cache_manager.update_cache(handler.cache, new_items=new_items)

    def prefill(self, handler: Any, queries: Any, items: Any, features: Any) -> Any:
        """Embed and insert the rows."""
        del queries, items
        return handler.prefill(self.problem.network, features, self.sizes.rows)

    def filter(self, handler: Any, queries: Any, items: Any, features: Any) -> Any:
        """Return which rows are new."""
        del queries, items
        return self.negcache.IsInCacheFilterFn(("id",))(handler.cache, features)

    def several(self, rows: int) -> Call:
        """Return a step on two caches of half the slots."""
        half, problem = self.sizes.slots // 2, self.problem
        handler = self.negcache.MultiCacheLossHandler(
            {name: problem.manager(half) for name in "ab"}, problem.loss()
        )
        data = {key: rows[:half] for key, rows in problem.cache.data.items()}
        part = self.negcache.NegativeCache(data, problem.cache.age[:half])
        handler.restore({"a": part, "b": part})
        queries, items, features = problem.batch(rows)
        new, given = dict.fromkeys("ab", items), dict.fromkeys("ab", features)
        return lambda: self.step(handler, queries, items, new, given)

    def commit(self, rows: int) -> Call:
        """Return only the third phase."""
        handler, (queries, items, features) = self.problem.handler(), self.problem.batch(rows)
        found = handler.retrieve(queries, features)
        negatives = self.problem.network(found.features)
        result = handler.compute_loss(queries, items, negatives, found)
        return lambda: handler.commit(result, items, features)

    def load(self) -> Call:
        """Return a load from a file."""
        handler = self.problem.handler()
        handler.save(self.path)
        return lambda: handler.load(self.path)

    def restore_into_less(self) -> Call:
        """Return a restore into a cache with one slot fewer."""
        manager = self.problem.manager(self.sizes.slots - 1)
        handler = self.negcache.CacheLossHandler(manager, self.problem.loss())
        return lambda: handler.restore(self.problem.cache, resize=True)

    def resize(self, handler: Any, *batch: Any) -> None:
        """Halve the slots, and double them."""
        del batch
        handler.resize(self.sizes.slots // 2)
        handler.resize(self.sizes.slots)

    def top_k(self) -> Call:
        """Return top-k groups of a score matrix, which belongs to the user: for few rows."""
        shape = (max(1, self.sizes.rows // 100), self.sizes.slots)
        scores = self.problem.native(np.random.default_rng(3).standard_normal(shape, np.float32))
        return lambda: self.negcache.approximate_top_k_with_indices(scores, 64)

    def plot(self, handler: Any, *batch: Any) -> None:
        """Draw the cache."""
        del batch
        importlib.import_module("matplotlib.pyplot").close(self.negcache.plot_cache(handler))

    def scaling(self) -> str:
        """Return the formulas' table."""
        sizes = {"batch_size": self.sizes.rows, "feature_bytes": 8, "world_size": 8}
        return str(self.negcache.scaling(self.sizes.slots, WIDTH, **sizes))


def measure(framework: str, names: list[str], sizes: Sizes) -> dict[str, dict[str, Any]]:
    """Return by verb the seconds and the bytes of one call."""
    problem, found = Problem(framework, sizes), {}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            call = Verbs(problem, Path(folder)).found[name]()
            start = time.process_time()
            call()
            seconds = time.process_time() - start
            rise = resident_rise(call, times=1)
            for _ in range(2 if seconds < LONG else 0):
                start = time.process_time()
                call()
                seconds = min(seconds, time.process_time() - start)
            found[name] = {"seconds": seconds, "bytes": rise}
            del call
            gc.collect()
    return found


def measure_apart(framework: str, names: list[str], sizes: Sizes) -> dict[str, dict[str, Any]]:
    """Run `measure` in a fresh process."""
    done = subprocess.run(  # noqa: S603 - this script itself
        [sys.executable, __file__, framework, "--one", *map(str, sizes), "--verb", *names],
        env={**os.environ, **ALLOCATOR, "MPLBACKEND": "agg"},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    found: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def rows_of(framework: str, names: list[str], sizes: Sizes) -> list[dict[str, Any]]:
    """Return the table's row for each verb."""
    once, more_rows, more_slots = (
        measure_apart(framework, names, each)
        for each in (
            sizes,
            sizes._replace(rows=2 * sizes.rows),
            sizes._replace(slots=2 * sizes.slots),
        )
    )
    found = []
    for name in names:
        known = once[name]["bytes"] is not None
        growth = {
            f"{what} of time": after[name]["seconds"] / once[name]["seconds"]
            for what, after in (("rows x 2", more_rows), ("slots x 2", more_slots))
        }
        extra = {
            f"{what}MB": after[name]["bytes"] / MB if known else None
            for what, after in (("", once), ("rows x 2: ", more_rows), ("slots x 2: ", more_slots))
        }
        linear = max(growth.values()) <= MOST_GROWTH or once[name]["seconds"] < SHORT
        found.append(
            {
                "framework": framework,
                "verb": name,
                "slots": sizes.slots,
                "rows": sizes.rows,
                "seconds": once[name]["seconds"],
                **growth,
                **extra,
                "linear": "yes" if linear else "no",
            }
        )
    return found


def main() -> None:
    """Measure the verbs that the command line asks for."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", maxsplit=1)[0])
    parser.add_argument("framework", choices=PACKAGES)
    parser.add_argument("--verb", nargs="+", help="instead of all")
    parser.add_argument("--slots", type=int, default=1_000_000)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--quick", action="store_true", help="100,000 slots and 2,000 rows")
    parser.add_argument("--one", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = options.verb or list(Verbs(Problem(options.framework, Sizes(2, 1)), Path()).found)
    if options.one:
        print(json.dumps(measure(options.framework, names, Sizes(*options.one))))
        return
    sizes = Sizes(100_000, 2_000) if options.quick else Sizes(options.slots, options.rows)
    found = rows_of(options.framework, names, sizes)
    path = save("no_verb_is_quadratic", found, ("framework", "verb", "slots", "rows"))
    print(table(found))
    print("written to", path)


if __name__ == "__main__":
    main()
