"""Phase one of a step: score the cache, draw negatives, and gather what the encoder needs.

Everything here is integers and constants; nothing is differentiated.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from negcache_core.arrays._array import Array, length, mask_rows, positions, take, take_columns
from negcache_core.arrays.backend import Backend
from negcache_core.arrays.numerics import log_sum_exp
from negcache_core.retrieval.retrieval_fns import choice
from negcache_core.retrieval.softmax_draw import draw_from_caches, draw_from_softmax
from negcache_core.retrieval.tiled_scores import CacheScores
from negcache_core.retrieval.top_k import best_of_all_groups, check_groups


class Draw(NamedTuple):
    """Slots (B, S) over all caches; drawn (B, S); log_partition (B,); entropy (B,).

    readout (B, D), where it was wanted; candidates (B, k), the best slot of each top-k group
    """

    slots: Array
    drawn: Array
    log_partition: Array
    entropy: Array
    readout: Array | None = None
    candidates: Array | None = None


def draw(
    caches: Sequence[CacheScores],
    *,
    noise: Array | None,
    retrieval_fn: Callable[[Array], Array] | None,
    top_k: int | None,
    readout: bool,
    backend: Backend,
) -> Draw:
    """Draw slots.

    Without `retrieval_fn` the draw is from the softmax, driven by `noise`; the score matrix (with
    top_k: of the groups' best) is made for a user's function alone. A slot that such a function
    chooses outside of the matrix counts as not drawn.
    """
    xp, columns, mean = backend.xp, None, None
    if top_k is None and retrieval_fn is None:
        slots, scores, log_partition, mean = draw_from_caches(caches, noise, readout=readout)
        drawn, mean_score = scores > -float("inf"), xp.mean(scores, axis=1)
    else:
        if top_k is None:
            matrix = xp.concat([cache.matrix() for cache in caches], axis=1)
        else:
            check_groups(top_k, sum(cache.slots for cache in caches))
            matrix, columns = best_of_all_groups(caches, top_k)
        if retrieval_fn is None:
            slots, log_partition = draw_from_softmax(matrix, noise, xp=xp)
        else:
            slots = choice(retrieval_fn(matrix), matrix.shape[0], backend)
            log_partition = log_sum_exp(matrix, xp=xp)
        inside = (slots >= 0) & (slots < matrix.shape[1])
        slots = xp.where(inside, slots, 0)
        scores = take_columns(matrix, slots, xp)
        drawn = inside & (scores > -float("inf"))
        slots = slots if columns is None else take_columns(columns, slots, xp)
        # The whole law is at hand here, so the entropy can be exact.
        law = xp.exp(matrix - xp.where(log_partition > -float("inf"), log_partition, 0.0)[:, None])
        mean_score = xp.sum(law * xp.where(matrix > -float("inf"), matrix, 0.0), axis=1)
    entropy = xp.where(log_partition > -float("inf"), log_partition - mean_score, 0.0)
    return Draw(slots, drawn, log_partition, entropy, mean, columns)


def with_stand_ins(
    features: Mapping[str, Array], drawn: Array, stand_in: Mapping[str, Array] | None, xp: Any
) -> dict[str, Array]:
    """Return features (n, …) of drawn rows, with those of `stand_in` where `drawn` (B, S) is False.

    So an encoder never sees the zeros of a slot that was not written.
    """
    if stand_in is None:
        return dict(features)
    count = length(next(iter(stand_in.values())), xp)
    flat = xp.reshape(drawn, (-1,))
    row = positions(flat, xp) // drawn.shape[1] % count
    return {
        key: xp.where(mask_rows(flat, rows), rows, take(stand_in[key], row, xp))
        for key, rows in features.items()
    }
