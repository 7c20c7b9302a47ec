"""Claim: a run may be as long as it likes: memory is flat, the cache correct, draws stay exact.

    python benchmarks/soak.py torch --steps 100000 --out results.json

It runs one process with one backend. Steps have random batch sizes and masks; now and then an
embedding is not finite, the item network raises, or the oldest rows are refreshed. Occasionally the
handler is saved, a new one with other options is made from scratch, loads the file and continues,
and the old one must be freed. A plain dict of rows goes through the same. At each change of
handlers both must be equal, number for number, and so must be

- the expectation of the training gradient, enumerated on the cache as it is, and the exact softmax
  cross-entropy gradient (1e-10, float64);
- the distribution of the handler's own draws and the softmax (six standard deviations of
  chi-squared);
- the number of live tensors, before a new handler's first step, and the number the time before.

Resident memory is sampled throughout; after a warm-up third two slopes are fitted, over all steps
and over the steps of each handler. It fails if one is above its bound by three standard errors;
see `_soak_memory`. Linux only.
"""

import argparse
import gc
import importlib
import json
import sys
import tempfile
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
from _soak_law import TOLERANCE, draw_deviation, gradient_error, problems_on
from _soak_memory import resident_bytes, summary
from _soak_problem import FIELDS, REFRESHED, SLOTS, TURNS, Stream, Turn
from tqdm import tqdm

from negcache_core import NegativeCache
from negcache_core.testing import DictCache

FRAMEWORKS = ("numpy", "torch", "tensorflow", "jax")
SAMPLES = 2_000
DEVIATIONS = 6
ESTIMATORS = ("paper", "shared", "exact_query")
REFRESH = 0.02


class UnsoundError(Exception):
    """Something that must hold does not."""


def require(holds: Any, what: str) -> None:
    """Raise UnsoundError unless `holds`."""
    if not holds:
        raise UnsoundError(what)


class Soak:
    """One run: a handler, and a dict that goes through the same."""

    def __init__(self, backend: Any, seed: int) -> None:
        self.backend, self.seed, self.stream = backend, seed, Stream(seed)
        self.turns = 0
        self.turn: Turn = TURNS[0]
        self.soaked = backend.Soaked(self.turn, self.stream.towers(), seed)
        zeros = {key: np.zeros(shape, dtype) for key, (shape, dtype) in FIELDS.items()}
        self.model = self.model_for(self.turn, zeros)
        self.slot_of: dict[int, int] = {}  # of written rows, by serial
        self.counts = dict.fromkeys(("raised", "refreshes", "not_finite", "handlers"), 0)
        self.error = self.deviation = 0.0
        self.checked: set[str] = set()
        self.live: list[int] = []

    @staticmethod
    def model_for(turn: Turn, zeros: dict[str, Any]) -> DictCache:
        """Return an empty dict model with a handler's options."""
        return DictCache(SLOTS, zeros, **turn.manager)

    def step(self) -> None:
        """Take a step, or make it fail; then perhaps refresh."""
        batch = self.stream.batch(self.turn.draws, self.soaked.sizes)
        try:
            _, positive, serials, fresh = self.soaked.step(batch)
        except self.backend.RAISED:
            require(batch.fails, "a step raised that should not have")
            self.counts["raised"] += 1
        else:
            require(not batch.fails, "the network raised, and the step did not")
            self.follow(batch.features, positive, serials, fresh)
        if self.stream.rng.random() < REFRESH:
            self.refresh(int(self.stream.rng.choice(REFRESHED)))

    def follow(self, features: Any, positive: Any, serials: Any, fresh: Any) -> None:
        """Do in the model what the step did, as seen by the network."""
        positive, fresh = np.array(positive), np.array(fresh)  # not views that keep tensors alive
        finite, enters = np.isfinite(fresh).all(axis=1), np.isfinite(positive).all(axis=1)
        self.counts["not_finite"] += int((~finite).sum() + (~enters).sum())
        enters &= features["serial"] >= 0
        if self.turn.known_stay_out:
            held = {int(self.model.held[slot]["id"]) for slot in self.model.age}
            enters &= np.asarray([int(each) not in held for each in features["id"]], bool)
        drawn = [self.slot_of.get(int(serial), -1) for serial in serials]
        rows = [
            {**{key: value[row] for key, value in features.items()}, "embedding": positive[row]}
            for row in range(len(positive))
        ]
        self.model.update(
            zip(drawn, ({"embedding": row} for row in fresh), finite, strict=True),
            zip(rows, enters, strict=True),
        )
        self.slot_of = {int(self.model.held[slot]["serial"]): slot for slot in self.model.age}

    def refresh(self, count: int) -> None:
        """Refresh the oldest rows; with none written the network is not called, or is ignored."""
        slots, spoil = self.model.oldest(count), self.stream.spoil(count)
        if not slots:
            return
        serials, fresh = self.soaked.refresh(count, spoil)
        expected = [int(self.model.held[slot]["serial"]) for slot in slots]
        require(list(serials[: len(slots)]) == expected, "not the oldest rows were refreshed")
        for slot, row in zip(slots, np.array(fresh[: len(slots)]), strict=True):
            if np.isfinite(row).all():
                self.model.reembed(slot, {"embedding": row})
        self.counts["refreshes"] += 1

    def check(self, estimators: tuple[str, ...]) -> None:
        """Compare the cache with the model, and its draws with the softmax."""
        data, age = self.soaked.cache()
        data = {key: np.asarray(rows).copy() for key, rows in data.items()}
        cache = NegativeCache(data, np.asarray(age).copy())
        require(list(cache.age) == self.model.ages(), "the ages are not the model's")
        for key, rows in cache.data.items():
            model = np.stack([self.model.held[slot][key] for slot in range(SLOTS)])
            require(np.array_equal(rows, model), f"the rows of {key} are not the model's")
        require(np.isfinite(cache.data["embedding"]).all(), "a row is not finite")
        towers = self.soaked.towers()
        self.checked.update(estimators)
        for estimator in estimators:
            for problem in problems_on(cache, towers, self.stream):
                self.error = max(self.error, gradient_error(self.backend, problem, estimator))
        require(self.error < TOLERANCE, f"the expected gradient is off by {self.error}")
        deviation = draw_deviation(self.soaked, self.turn, cache, self.stream)
        self.deviation = max(self.deviation, deviation)
        require(deviation < DEVIATIONS, f"draws are {deviation} standard deviations off")

    def change(self, folder: Path) -> None:
        """Save, make a new handler with the next options, load, and check that the old one goes."""
        self.soaked.save(folder / "state")
        old, towers = weakref.ref(self.soaked.handler), self.soaked.towers()
        self.turns += 1
        self.turn = TURNS[self.turns % len(TURNS)]
        self.soaked = self.backend.Soaked(self.turn, towers, self.seed + self.turns)
        gc.collect()
        require(old() is None, "the old handler is still referred to")
        self.soaked.load(folder / "state")
        model, self.model = self.model, self.model_for(self.turn, {})
        self.model.held, self.model.age = model.held, model.age
        self.counts["handlers"] += 1
        gc.collect()
        if self.checked.issuperset(ESTIMATORS):  # each makes objects that are kept for later checks
            self.live.append(self.backend.live_tensors())

    def report(self) -> dict[str, Any]:
        """Return what was done, and the results."""
        require(len(set(self.live)) < 2, f"the number of live tensors changed: {self.live}")
        return {
            **self.counts,
            "live_tensors": self.live[-1:],
            "gradient_error": self.error,
            "draws_off_by": round(self.deviation, 2),
            "oldest_row": max(self.model.age.values()),
        }


def run(framework: str, steps: int, turn: int, seed: int) -> dict[str, Any]:
    """Take all steps; return the figures. Raises UnsoundError if something does not hold."""
    soak = Soak(importlib.import_module(f"_soak_{framework}"), seed)
    samples, begin = [], time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for step in tqdm(range(1, steps + 1), desc=framework, mininterval=1.0):
            soak.step()
            if step % max(1, steps // SAMPLES) == 0:
                samples.append((step, resident_bytes()))
            if step == steps or step % turn == 0:
                soak.check(ESTIMATORS if step == steps else (soak.turn.estimator,))
            if step != steps and step % turn == 0:
                soak.change(Path(folder))
    figures = {"framework": framework, "steps": steps, "seconds": time.perf_counter() - begin}
    return {**figures, **soak.report(), **summary(samples, turn)}


def main() -> int:
    """Run one backend."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("framework", choices=FRAMEWORKS)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--turn", type=int, default=2_500, help="steps until handlers change")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    arguments = parser.parse_args()
    try:
        figures = run(arguments.framework, arguments.steps, arguments.turn, arguments.seed)
    except UnsoundError as error:
        print(f"{arguments.framework}: {error}", file=sys.stderr)
        return 1
    print(json.dumps(figures))
    if arguments.out:
        arguments.out.write_text(json.dumps(figures, indent=1) + "\n")
    return 0 if figures["flat"] else 1


if __name__ == "__main__":
    sys.exit(main())
