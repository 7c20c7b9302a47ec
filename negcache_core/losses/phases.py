"""The two phases of a loss, as functions of its options: draw negatives, and the loss from them."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, ClassVar, Protocol

from negcache_core.arrays._array import Array, accumulation_dtype, cast, length, positions
from negcache_core.arrays.backend import Backend
from negcache_core.arrays.numerics import mean
from negcache_core.cache.named import SINGLE, check_window, named_caches
from negcache_core.cache.state import NegativeCache
from negcache_core.errors import DTypeError
from negcache_core.losses.callbacks import reduced, scale_for, transformed
from negcache_core.losses.estimators import ESTIMATORS
from negcache_core.losses.inputs import (
    check_competing,
    check_embeddings,
    check_hard_labels,
    check_request,
    check_weight,
)
from negcache_core.losses.learning import learning_alike
from negcache_core.losses.nonfinite import gathered
from negcache_core.losses.objective import estimate
from negcache_core.losses.results import CacheLossReturn, refresh_of
from negcache_core.retrieval.placement import Placement
from negcache_core.retrieval.prefixes import Prefixes
from negcache_core.retrieval.request import Request, Wanted
from negcache_core.retrieval.result import Retrieval, check_retrieval
from negcache_core.retrieval.retrieve import retrieve
from negcache_core.retrieval.scorer import Scorer


class Phased(Protocol):
    """What the phases read from a loss; see CacheClassificationLoss."""

    backend: ClassVar[Backend]
    placement: Placement
    embedding_key: str
    data_keys: tuple[str, ...]
    id_keys: tuple[str, ...]
    group_key: str | None
    margin: float | None
    log_frequency_key: str | None
    num_samples: int
    top_k: int | None
    retrieval_fn: Callable[[Any], Array] | None
    in_batch_negatives: bool
    tile_bytes: int | None
    score_transform: Callable[[Array], Array] | None
    scale: Any
    reducer: Callable[[Array], Array] | None
    estimator: str
    max_staleness: float | None
    staleness_correction: bool
    prefixes: Prefixes | None
    fused: bool
    generator: Any

    def guard(self, cache: Any) -> AbstractContextManager[None]:
        """Undo draws on an error."""


def draw_negatives(
    loss: Phased,
    query_embeddings: Array,
    cache: NegativeCache | Mapping[str, NegativeCache],
    pos_features: Mapping[str, Array] | None,
    positive_ids: Any,
    pos_doc_embeddings: Array | None,
    noise: Array | None,
    *,
    by_chance: bool = True,
) -> Retrieval:
    """Check the arguments of `retrieve`, and draw; by_chance=False asks no generator."""
    backend, wanted = loss.backend, _wanted(loss)
    if not by_chance:
        noise = _middle_noise(query_embeddings, loss.num_samples, backend.xp)
        wanted = wanted._replace(retrieval_fn=None)
    caches = named_caches(cache, wanted.fields, backend)
    if by_chance:  # an evaluation without a window is against the whole cache
        check_window(caches, loss.max_staleness)
    queries, batch, stand_in, noise, positives = check_request(
        query_embeddings,
        caches,
        pos_features,
        positive_ids,
        pos_doc_embeddings,
        noise,
        wanted,
        backend,
        scores_positives=loss.margin is not None,
    )
    with backend.no_gradient(), loss.guard(cache):
        queries = backend.stop_gradient(queries)
        scorer = _scorer(loss, queries, caches.first().data[loss.embedding_key])
        if loss.fused and scorer.dtype == backend.xp.float64:
            raise DTypeError(
                "fused=True is for float32 and smaller, but the queries or the cache are float64: "
                "leave it out, or use float32."
            )
        if positives is not None:
            ceiling = scorer.pairs(queries, positives) + loss.margin
            if scorer.prefixes is not None:
                ceiling = backend.xp.reshape(ceiling, (-1, scorer.prefixes.number))
            batch = batch.under(backend.stop_gradient(ceiling))
        request = Request(
            wanted, queries, caches, batch, stand_in, noise, loss.generator, scorer, backend
        )
        retrieval = retrieve(request, loss.placement)
    if not isinstance(cache, Mapping):
        retrieval = retrieval._replace(slots=retrieval.slots[SINGLE], owned=retrieval.owned[SINGLE])
    return retrieval


def check_own(loss: Phased, retrieval: Any) -> None:
    """Raise unless `retrieval` is what this loss's own `retrieve` may have returned."""
    estimator = ESTIMATORS[loss.estimator]
    check_retrieval(
        retrieval,
        loss.backend,
        pool=estimator.shares_draws,
        readout=estimator.reads_out,
        others=loss.in_batch_negatives,
        own=bool(loss.id_keys) or loss.group_key is not None,
        by_width=loss.prefixes is not None,
        route=loss.placement.sharded,
    )


def loss_of(
    loss: Phased,
    query_embeddings: Array,
    pos_doc_embeddings: Array,
    neg_doc_embeddings: Array,
    retrieval: Retrieval,
    hard_negative_embeddings: Array | None,
    hard_negative_features: Mapping[str, Any] | None,
    competing_scores: Array | None,
    sample_weight: Array | None,
    constant: Iterable[str] | None = None,
) -> CacheLossReturn:
    """Check embeddings, and return the loss from this loss's own retrieval.

    constant: which items may carry no gradient while others do; None if nothing learns
    """
    backend = loss.backend
    embedded = check_embeddings(
        retrieval,
        query_embeddings,
        pos_doc_embeddings,
        neg_doc_embeddings,
        hard_negative_embeddings,
        loss.embedding_key,
        backend,
    )
    hard_labels = None
    if hard_negative_features is not None:
        hard_labels = check_hard_labels(
            hard_negative_features, embedded.hard, retrieval, loss.id_keys, loss.group_key, backend
        )
    if competing_scores is not None:
        of_widths = loss.prefixes is not None
        competing = check_competing(competing_scores, retrieval, backend, of_widths=of_widths)
        embedded = embedded._replace(competing=competing)
    if constant is not None:
        embedded = learning_alike(embedded, constant, backend)
    scorer = _scorer(loss, *embedded[:3], retrieval.stale_embeddings)
    weight = check_weight(sample_weight, retrieval, scorer.dtype, backend)
    estimated = estimate(
        gathered(embedded, retrieval, loss.placement, scorer.dtype, backend.xp),
        retrieval,
        scorer,
        backend,
        estimator=ESTIMATORS[loss.estimator],
        staleness_correction=loss.staleness_correction,
        hard_labels=hard_labels,
        margin=loss.margin,
        tile_bytes=loss.tile_bytes,
    )
    training, interpretable = estimated.training, estimated.interpretable
    if weight is not None:
        training, interpretable = training * weight, interpretable * weight
    training = _reduced(loss, training, retrieval)
    interpretable = _reduced(loss, interpretable, retrieval)
    fresh, finite = loss.placement.give_back((estimated.fresh, estimated.finite), retrieval.route)
    return CacheLossReturn(
        training,
        interpretable,
        *refresh_of(retrieval, {loss.embedding_key: fresh}, finite),
        staleness=_reduced(loss, estimated.staleness, retrieval),
        # A constant, and a difference that is exactly zero whatever the surrogate's magnitude.
        loss=interpretable + (training - backend.stop_gradient(training)),
        metrics=estimated.metrics,
        drift=estimated.drift,
    )


def _wanted(loss: Phased) -> Wanted:
    """Return the current options that retrieval needs."""
    estimator = ESTIMATORS[loss.estimator]
    return Wanted(
        loss.embedding_key,
        loss.data_keys,
        loss.id_keys,
        loss.group_key,
        loss.log_frequency_key,
        loss.num_samples,
        loss.top_k,
        loss.retrieval_fn,
        loss.in_batch_negatives,
        estimator.shares_draws,
        estimator.reads_out,
        loss.tile_bytes,
        loss.prefixes,
        loss.fused,
    )


def _middle_noise(queries: Array, draws: int, xp: Any) -> Array:
    """Return noise (B, draws, 2) of 0.5."""
    middle = cast(positions(queries, xp), xp.float32, xp) * 0.0 + 0.5
    found: Array = xp.broadcast_to(middle[:, None, None], (length(queries, xp), draws, 2))
    return found


def _scorer(loss: Phased, *arrays: Array) -> Scorer:
    xp, scale, transform = loss.backend.xp, loss.scale, loss.score_transform
    dtype = accumulation_dtype(*arrays, xp=xp)
    if scale is not None and not isinstance(scale, (int, float)):
        scale = partial(scale_for, scale, arrays[0], loss.backend)
    if transform is not None:
        transform = partial(transformed, transform, dtype=dtype, backend=loss.backend)
    return Scorer(scale, transform, dtype, xp, loss.prefixes)


def _reduced(loss: Phased, values: Array, retrieval: Retrieval) -> Any:
    if loss.reducer is mean:
        return loss.placement.reduce_mean(values, retrieval, loss.backend.xp)
    return values if loss.reducer is None else reduced(loss.reducer, values, loss.backend)
