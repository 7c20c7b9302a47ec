"""Drawing slots: from the softmax, from the best of top-k groups, or as a user's function does."""

from typing import Any, NamedTuple

from negcache_core.arrays._array import Array, length, take_columns
from negcache_core.arrays.numerics import log_sum_exp
from negcache_core.retrieval.request import Request
from negcache_core.retrieval.retrieval_fns import choice
from negcache_core.retrieval.softmax_draw import draw_from_caches, draw_from_softmax
from negcache_core.retrieval.tiled_scores import CacheScores
from negcache_core.retrieval.top_k import best_of_all_groups, check_groups


class Slots(NamedTuple):
    """Slots (B, S) over all caches; drawn (B, S); log_partition (B,); entropy (B,).

    readout (B, D), if it was requested; candidates (B, k), the best slot of each top-k group; with
    prefixes log_partition is (B, W), and entropy the mean over the widths that were drawn by
    """

    slots: Array
    drawn: Array
    log_partition: Array
    entropy: Array
    readout: Array | None = None
    candidates: Array | None = None


def draw_slots(request: Request, caches: list[CacheScores]) -> Slots:
    """Draw slots.

    Without `retrieval_fn` the draw is from the softmax, driven by noise; the score matrix (with
    top_k: of the groups' best) is made for a user's function alone. A slot that such a function
    chooses outside the matrix counts as not drawn.
    """
    wanted, backend, xp = request.wanted, request.backend, request.backend.xp
    noise: Any = request.noise
    if noise is None and wanted.retrieval_fn is None:
        shape = (length(request.queries, xp), wanted.num_samples, 2)
        noise = backend.uniform(request.generator, shape, request.queries)
    columns, mean = None, None
    if wanted.top_k is None and wanted.retrieval_fn is None:
        slots, scores, log_partition, mean = draw_from_caches(
            caches, noise, readout=wanted.reads_out
        )
        drawn = scores > -float("inf")
        if wanted.prefixes is not None:  # these scores are logs of probabilities
            entropy = -xp.mean(xp.where(drawn, scores, 0.0), axis=1)
            return Slots(slots, drawn, log_partition, entropy, mean)
        mean_score = xp.mean(scores, axis=1)
    else:
        if wanted.top_k is None:
            matrix = xp.concat([cache.matrix() for cache in caches], axis=1)
        else:
            check_groups(wanted.top_k, sum(cache.slots for cache in caches))
            matrix, columns = best_of_all_groups(caches, wanted.top_k)
        if wanted.retrieval_fn is None:
            slots, log_partition = draw_from_softmax(matrix, noise, xp=xp)
        else:
            slots = choice(wanted.retrieval_fn(matrix), matrix.shape[0], backend)
            log_partition = log_sum_exp(matrix, xp=xp)
        inside = (slots >= 0) & (slots < matrix.shape[1])
        slots = xp.where(inside, slots, 0)
        scores = take_columns(matrix, slots, xp)
        drawn = inside & (scores > -float("inf"))
        slots = slots if columns is None else take_columns(columns, slots, xp)
        # The whole softmax is available here, so the entropy can be exact.
        top = xp.where(log_partition > -float("inf"), log_partition, 0.0)
        probabilities = xp.exp(matrix - top[:, None])
        mean_score = xp.sum(probabilities * xp.where(matrix > -float("inf"), matrix, 0.0), axis=1)
    entropy = xp.where(log_partition > -float("inf"), log_partition - mean_score, 0.0)
    return Slots(slots, drawn, log_partition, entropy, mean, columns)
