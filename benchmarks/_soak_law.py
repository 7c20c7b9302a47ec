"""Check expected gradients, and the distribution of real draws, on the current cache."""

import math
from typing import Any, NamedTuple

import numpy as np
from _soak_problem import SCALE, Arrays, Stream, Turn

from negcache_core import EMPTY, exact
from negcache_core.retrieval.tiled_scores import BLOCK

TOLERANCE = 1e-10
NEGLIGIBLE = 1e-15  # for omitted outcomes: at most 256 of them, with gradients of order one
FEW, DRAWN = 12, 2048


class Problem(NamedTuple):
    """Queries y and positives x (B, INPUTS), the cache's rows and ages, and both towers."""

    y: Any
    x: Any
    data: Arrays
    age: Any
    towers: Arrays

    @property
    def arrays(self) -> tuple[Any, Any, Any]:
        """Queries, positives, and the fresh embeddings of all slots."""
        item = self.towers["item"]
        return self.y @ self.towers["query"], self.x @ item, self.data["x"] @ item

    @property
    def scores(self) -> Any:
        """Stale scores (B, C), -inf for slots that were never written."""
        scores = SCALE * self.arrays[0] @ self.data["embedding"].T
        return np.where(self.age != EMPTY, scores, -np.inf)


def softmax(scores: Any) -> Any:
    """Return the softmax over the last axis."""
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def noise_for(slots: Any, law: Any) -> Any:
    """Return uniforms (B, 1, 2) that draw slots (B, 1): the middle of each slot's interval.

    The first picks a block of slots by its weight, the second a slot in it.
    """
    queries, blocks = len(law), -(-law.shape[1] // BLOCK)
    padded = np.zeros((queries, blocks * BLOCK))
    padded[:, : law.shape[1]] = law
    padded = padded.reshape(queries, blocks, BLOCK)
    every, (block, place) = np.arange(queries), np.divmod(slots[:, 0], BLOCK)
    weight = padded.sum(axis=2)
    within = padded[every, block] / weight[every, block][:, None]
    first = (np.cumsum(weight, axis=1) - weight / 2)[every, block]
    second = (np.cumsum(within, axis=1) - within / 2)[every, place]
    return np.stack([first, second], axis=1)[:, None, :]


def outcomes_of(problem: Problem) -> list[tuple[Any, float]]:
    """Return every outcome of one draw per query: uniforms (B, 1, 2), and its probability."""
    law = softmax(problem.scores)
    return [
        (noise_for(np.asarray(slots), law), probability)
        for slots, probability in exact.enumerate_draws(law)
        if probability > NEGLIGIBLE
    ]


def gradients_of(problem: Problem) -> tuple[Any, Any, Any]:
    """Return the exact gradients by the query tower, the item tower, and the scale."""
    query, positive, fresh = problem.arrays
    gradients = exact.softmax_cross_entropy(
        query,
        positive,
        problem.data["embedding"],
        fresh_items=fresh,
        scale=SCALE,
        mask=problem.age != EMPTY,
    ).gradients
    return chained(problem, gradients)


def chained(problem: Problem, gradients: exact.Gradients) -> tuple[Any, Any, Any]:
    """Propagate gradients by embeddings to the towers."""
    by_item = problem.data["x"].T @ gradients.items + problem.x.T @ gradients.positive
    return problem.y.T @ gradients.query, by_item, gradients.scale


def problems_on(cache: Any, towers: Arrays, stream: Stream) -> list[Problem]:
    """Return one query against every slot, and two against a dozen of them."""
    written = np.flatnonzero(cache.age != EMPTY)
    found = []
    for queries, slots in ((1, np.arange(len(cache.age))), (2, stream.rng.permutation(written))):
        some = slots if queries == 1 else slots[:FEW]
        x = stream.items[stream.rng.integers(0, len(stream.items), queries)]
        y = x + 0.3 * stream.rng.standard_normal(x.shape)
        data = {key: rows[some] for key, rows in cache.data.items()}
        found.append(Problem(y, x, data, cache.age[some], towers))
    return found


def gradient_error(backend: Any, problem: Problem, estimator: str) -> float:
    """Return the error of the enumerated expectation, over 1 or the gradient's size."""
    given = exact.expectation(iter(outcomes_of(problem)), backend.gradients(problem, estimator))
    return max(
        float(np.max(np.abs(ours - exactly) / np.maximum(1.0, np.abs(exactly))))
        for ours, exactly in zip(given, gradients_of(problem), strict=True)
    )


def draw_deviation(soaked: Any, turn: Turn, cache: Any, stream: Stream) -> float:
    """Return how many standard deviations the handler's own draws are off their distribution.

    A chi-squared statistic of one query's draws; slots that expect fewer than 5 count together.
    """
    x = stream.items[stream.rng.integers(0, len(stream.items))]
    problem = Problem(x[None], x[None], cache.data, cache.age, soaked.towers())
    scores = problem.scores
    if "log_frequency_key" in turn.loss:
        scores = scores - cache.data["log_frequency"]
    if "top_k" in turn.loss:
        groups = np.array_split(np.arange(scores.shape[1]), turn.loss["top_k"])
        best = [group[scores[0, group].argmax()] for group in groups]
        scores = np.where(np.isin(np.arange(scores.shape[1]), best), scores, -np.inf)
    law = softmax(scores)[0]
    if "retrieval_fn" in turn.loss:
        law = np.arange(len(law)) == scores[0].argmax()
    slots = soaked.draw(np.tile(x, (DRAWN, 1))).reshape(-1)
    counts, expected = np.bincount(slots, minlength=len(law)), law * len(slots)
    rare = expected < 5
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    if counts[expected == 0].any():
        return math.inf
    counts, expected = counts[expected > 0], expected[expected > 0]
    freedom = len(counts) - 1
    surplus = float(((counts - expected) ** 2 / expected).sum() - freedom)
    return surplus / math.sqrt(2 * freedom) if freedom else abs(surplus)
