"""The law of a draw by other ways than the library's: statistics, plain loops, enumeration."""

import bisect
import itertools

import numpy as np

from negcache_core.retrieval.tiled_scores import BLOCK

TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}
COMPILING = ("tf.function", "tf.function+xla", "jax", "jax.jit")


def chi_square_is_plausible(counts, probabilities):
    """Compare with the 1 - 1e-5 quantile, by Wilson and Hilferty's approximation."""
    kept = probabilities * counts.sum() >= 5
    counts = np.append(counts[kept], counts[~kept].sum())
    expected = np.append(probabilities[kept], probabilities[~kept].sum()) * counts.sum()
    counts, expected = counts[expected > 0], expected[expected > 0]
    freedom = len(counts) - 1
    statistic = ((counts - expected) ** 2 / expected).sum()
    spread = 2 / (9 * freedom)
    return statistic < freedom * (1 - spread + 4.265 * spread**0.5) ** 3


def naive_slot(scores, first, second):
    """Two-level inverse distribution function, one number at a time."""
    blocks = [scores[start : start + BLOCK] for start in range(0, len(scores), BLOCK)]
    top = max(scores)
    weights = [sum(np.exp(score - top) for score in block) for block in blocks]
    block = pick(weights, first)
    return block * BLOCK + pick([np.exp(score - top) for score in blocks[block]], second)


def pick(weights, uniform):
    sums = list(itertools.accumulate(weights))
    return bisect.bisect_right(sums, uniform * sums[-1])


def noise_for(slots, law, cut=0):
    """Return uniforms (B, S, 2) that draw `slots`: the middle of each one's stretch of the law.

    The first picks a block: here the slots before `cut` and those after it, where two caches meet
    there, or else all. Group maxima keep their order, so a law over them has the same stretches.
    """
    slots = np.asarray(slots)
    block = (slots >= cut).astype(int)
    in_block = np.stack([np.arange(law.shape[1]) < cut, np.arange(law.shape[1]) >= cut])
    weight = law @ in_block.T
    first = np.take_along_axis(np.cumsum(weight, axis=1) - weight / 2, block, axis=1)
    within = np.where(in_block[block], law[:, None, :], 0.0)
    within /= within.sum(axis=2, keepdims=True)
    middle = np.cumsum(within, axis=2) - within / 2
    second = np.take_along_axis(middle, slots[:, :, None], axis=2)[:, :, 0]
    return np.stack([first, second], axis=-1)


def law_of_scores(scores):
    """Return the softmax (B, C) of scores, 0 for -inf."""
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def expected_gradients(backend, value, arrays, outcomes):
    """Return the gradients by arrays of the sum of probability * value(*arrays, noise).

    A library that compiles has one program for all outcomes: one of their sum takes far longer.
    """
    if backend.name not in COMPILING:

        def total(*arrays):
            return sum((share * value(*arrays, noise) for noise, share in outcomes), 0.0)

        return backend.gradients(total, arrays)
    found = [0.0] * len(arrays)
    for noise, share in outcomes:
        gradients = backend.gradients(value, arrays, noise)
        found = [a + share * np.asarray(b) for a, b in zip(found, gradients, strict=True)]
    return found


def results_of(loss, W, query, positive, cache, outcomes, **arguments):
    """Yield a linear tower's result for each outcome (noise, probability), with the probability."""
    for noise, probability in outcomes:
        result = loss(
            lambda features: features["x"] @ W, query, positive, cache, noise=noise, **arguments
        )
        yield result, probability
