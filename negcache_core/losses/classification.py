"""The cache classification loss: cross-entropy against everything in the cache.

The loss is -log of the positive's probability in the softmax over the positive and every row of
the cache. Its value comes from stale scores; its gradient from the few rows that were drawn and
embedded anew. `retrieve` and `loss_from_negatives` are the two phases of calling it.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, ClassVar

from negcache_core.arrays._array import (
    Array,
    accumulation_dtype,
    cast,
    dtype_kind,
    dtype_name,
    length,
)
from negcache_core.arrays.backend import NUMPY, Backend
from negcache_core.arrays.numerics import mean
from negcache_core.arrays.rollback import UndoneOnError
from negcache_core.arrays.validation import (
    array_of,
    as_whole,
    check_device,
    check_field_names,
    check_flag,
    check_floating,
    check_function,
    check_shape,
    embeddings_of,
    shape_of,
)
from negcache_core.cache.named import SINGLE, filled, gather, named_caches
from negcache_core.cache.row_checks import check_stand_in
from negcache_core.cache.state import NegativeCache
from negcache_core.errors import DTypeError, KindError, OptionError
from negcache_core.losses.callbacks import check_scale, reduced, scale_for, transformed
from negcache_core.losses.estimators import check_estimator
from negcache_core.losses.nonfinite import Embedded
from negcache_core.losses.objective import estimate
from negcache_core.losses.results import CacheLoss, CacheLossReturn
from negcache_core.retrieval.positives import Positives, others_of, positives_of
from negcache_core.retrieval.proposal import Pool, cross_scores, pool_of
from negcache_core.retrieval.result import Retrieval, check_retrieval
from negcache_core.retrieval.retrieve import draw, with_stand_ins
from negcache_core.retrieval.scorer import Scorer
from negcache_core.retrieval.tiled_scores import CacheScores, scores_of
from negcache_core.retrieval.top_k import check_top_k


class CacheClassificationLoss(CacheLoss):
    """Cross-entropy of the positive against the positive and every written row of the cache.

    Per query i, with s+ the positive's score, t_j the stale score of slot j, and j drawn from
    softmax(t):  loss = log(exp(s+) + sum_j exp(t_j)) - s+,  gradient of (1 - p+) (s_j - s+).

    embedding_key:   the cache field that holds embeddings (D,)
    data_keys:       the fields that the item network takes
    score_transform: elementwise function of scores; may hold a trained temperature
    top_k:           compete against the best of each of k contiguous groups of slots only. This
                     changes the objective: it is no longer the cross-entropy over all slots.
    reducer:         (B,) values -> what is returned; the mean by default, None for per-query values
    retrieval_fn:    scores (B, C) -> slots (B, 1); replaces softmax sampling, biased in general
    scale:           factor on the dot products, before score_transform: a number, a scalar tensor
                     that may be trained, or a function of no arguments that returns one
    estimator:       "paper", "shared" or "exact_query", see `negcache_core.losses.estimators`
    num_samples:     S, draws per query, with replacement
    in_batch_negatives: whether the batch's other positives compete too, exactly, with gradients
    id_key:          a field of integers that tell items apart. Rows with the id of a positive of
                     the query are no negatives of it: not drawn, not counted, on no path.
    log_frequency_key: a floating field (scalar per row), the log of how often an item comes up in
                     the stream. It is subtracted from the scores of cached rows and in-batch
                     negatives, which are there in proportion to it, and not from the positive's.
    staleness_correction: whether the drawn rows' fresh scores re-weight them, self-normalised
    generator:       None, an int seed, or a random generator of the framework
    tile_bytes:      memory for scores in flight; the cache is scored in tiles that fit it. By
                     default 4 MB on a CPU and 64 MB elsewhere. Changes the speed, never the law.

    Raises OptionError, KindError or CapacityError on an argument that cannot work.
    Source: the paper, sections 3.1 and 3.2; published as `losses.CacheClassificationLoss`.
    Differs from it: (1) empty slots neither count nor are drawn; (2) `interpretable_loss` is
    finite; (3) half types are scored and summed in float32; (4) `loss` joins the two losses.

    >>> import numpy as np
    >>> from negcache_core import NegativeCache
    >>> rows = np.asarray([[1.0], [-1.0]])
    >>> cache = NegativeCache({"emb": rows, "x": rows}, np.zeros(2, np.int32))
    >>> loss = CacheClassificationLoss("emb", ["x"], generator=0)
    >>> out = loss(lambda data: data["x"], np.asarray([[3.0]]), np.asarray([[1.0]]), cache)
    >>> round(float(out.interpretable_loss), 4)
    0.6944
    """

    backend: ClassVar[Backend] = NUMPY

    def __init__(
        self,
        embedding_key: str,
        data_keys: Iterable[str],
        score_transform: Callable[[Array], Array] | None = None,
        top_k: int | None = None,
        reducer: Callable[[Array], Array] | None = mean,
        *,
        retrieval_fn: Callable[[Array], Array] | None = None,
        scale: Any = None,
        estimator: str = "paper",
        num_samples: int = 1,
        in_batch_negatives: bool = False,
        id_key: str | None = None,
        log_frequency_key: str | None = None,
        staleness_correction: bool = False,
        generator: Any = None,
        tile_bytes: int | None = None,
    ) -> None:
        super().__init__()
        self.embedding_key, self.data_keys = check_field_names(embedding_key, data_keys)
        for name, function in (
            ("score_transform", score_transform),
            ("reducer", reducer),
            ("retrieval_fn", retrieval_fn),
        ):
            if function is not None:
                check_function(function, name, "a function, or None")
        self.num_samples = _positive(num_samples, "num_samples", MOST_DRAWS)
        self.tile_bytes = tile_bytes
        if tile_bytes is not None:
            self.tile_bytes = _positive(tile_bytes, "tile_bytes", None)
        self.score_transform = score_transform
        self.top_k = check_top_k(top_k)
        self.reducer = reducer
        self.retrieval_fn = retrieval_fn
        self.scale = check_scale(scale)
        self.staleness_correction = check_flag(staleness_correction, "staleness_correction")
        self.in_batch_negatives = check_flag(in_batch_negatives, "in_batch_negatives")
        self.estimator = check_estimator(
            estimator,
            transform=score_transform is not None,
            top_k=top_k is not None,
            retrieval_fn=retrieval_fn is not None,
            correction=self.staleness_correction,
        )
        for name, key in (("id_key", id_key), ("log_frequency_key", log_frequency_key)):
            if key is not None and not isinstance(key, str):
                raise KindError(f"{name} is {key!r}: expected a field name, or None.")
        self.id_key, self.log_frequency_key = id_key, log_frequency_key
        self.generator = self.backend.make_generator(generator)

    @property
    def item_keys(self) -> dict[str, str]:
        """What retrieval reads of items beside `data_keys`: "ids" and "bias" -> the field."""
        found = {"ids": self.id_key, "bias": self.log_frequency_key}
        return {name: key for name, key in found.items() if key is not None}

    def retrieve(
        self,
        query_embeddings: Array,
        cache: NegativeCache | Mapping[str, NegativeCache],
        *,
        pos_features: Mapping[str, Array] | None = None,
        positive_ids: Array | None = None,
        noise: Array | None = None,
    ) -> Retrieval:
        """Draw negatives: phase one. No gradient flows, and nothing is embedded.

        query_embeddings: (B, D)
        cache:            a NegativeCache, or a dict of named ones that count as one
        pos_features:     field -> (rows, …), features of the positives; they stand in where no slot
                          is usable, so that the encoder never sees the zeros of an unwritten slot;
                          with id_key or log_frequency_key these fields too, (B,)
        positive_ids:     (B, P) integers, all items that are positives of a query; by default the
                          id of its one positive. Fill up rows with an id twice, or one of no item.
        noise:            (B, S, 2) floating uniforms in [0, 1); drawn from the generator where None
        """
        backend = self.backend
        caches = named_caches(
            cache, (self.embedding_key, *self.data_keys, *self.item_keys.values()), backend
        )
        table = next(iter(caches.values())).data[self.embedding_key]
        what = f"field {self.embedding_key!r}"
        check_floating(check_shape(table, ("C", "D"), what, "Embeddings are vectors."), what)
        query_embeddings = embeddings_of(
            query_embeddings, ("B", table.shape[1]), "query_embeddings", backend, like=table
        )
        if noise is not None:
            expected = (query_embeddings.shape[0], self.num_samples, 2)
            noise = array_of(noise, expected, "noise", backend, "Uniforms in [0, 1).")
            check_device(check_floating(noise, "noise"), table, "noise", backend)
        stand_in = None
        if pos_features is not None:
            stand_in = check_stand_in(pos_features, self.data_keys, caches, backend)
            stand_in = None if 0 in (row.shape[0] for row in stand_in.values()) else stand_in
        batch = positives_of(
            query_embeddings,
            pos_features,
            positive_ids,
            self.id_key,
            self.log_frequency_key,
            caches,
            backend,
            in_batch=self.in_batch_negatives,
        )
        with backend.no_gradient(), self.undone_on_error():
            queries = backend.stop_gradient(query_embeddings)
            found = self._draw(queries, caches, batch, stand_in, noise)
        if not isinstance(cache, Mapping):
            found = found._replace(slots=found.slots[SINGLE], owned=found.owned[SINGLE])
        return found

    def _draw(
        self,
        queries: Array,
        caches: Mapping[str, NegativeCache],
        batch: Positives,
        stand_in: Mapping[str, Array] | None,
        noise: Array | None,
    ) -> Retrieval:
        """Retrieve, from checked arguments; slots are by cache name."""
        backend, xp = self.backend, self.backend.xp
        scores = self._scores(queries, caches, batch.ids)
        if noise is None and self.retrieval_fn is None:
            shape = (length(queries, xp), self.num_samples, 2)
            noise = backend.uniform(self.generator, shape, queries)
        draws = draw(
            scores,
            noise=noise,
            retrieval_fn=self.retrieval_fn,
            top_k=self.top_k,
            readout=self.estimator == "exact_query",
            backend=backend,
        )
        rows = gather(
            caches,
            draws.slots,
            draws.drawn,
            self.embedding_key,
            self.data_keys,
            backend,
            self.item_keys,
        )
        pool = None
        if self.estimator != "paper":
            drawn, slots = (xp.reshape(each, (-1,)) for each in (draws.drawn, draws.slots))
            cross = cross_scores(scores, rows, drawn, slots, draws.candidates)
            stale = rows["stale_embeddings"]
            pool = pool_of(cross, draws.log_partition, stale, self.num_samples, xp=xp)
        others = None
        if self.in_batch_negatives:
            others = others_of(queries, batch.ids, queries, batch.items, 0, xp=xp)
        return self._retrieval(
            rows,
            stand_in,
            drawn=draws.drawn,
            log_partition=draws.log_partition,
            entropy=draws.entropy,
            fill=filled(caches, scores[0].scorer.dtype, xp),
            pool=pool,
            readout=draws.readout,
            others=others,
            positive_bias=batch.bias,
        )

    def _scores(
        self,
        queries: Array,
        caches: Mapping[str, NegativeCache],
        positive_ids: Array | None,
        first: int = 0,
    ) -> list[CacheScores]:
        table = next(iter(caches.values())).data[self.embedding_key]
        return scores_of(
            queries,
            caches,
            self.embedding_key,
            self._scorer(queries, table),
            self.backend,
            self.tile_bytes,
            id_key=self.id_key,
            positive_ids=positive_ids,
            bias_key=self.log_frequency_key,
            first=first,
        )

    def _retrieval(
        self, rows: Mapping[str, Any], stand_in: Mapping[str, Array] | None, **known: Any
    ) -> Retrieval:
        """Return a Retrieval of constants, without what the encoder must not see."""
        constant = self.backend.stop_gradient
        for key in ("log_partition", "entropy", "readout"):
            known[key] = None if known[key] is None else constant(known[key])
        if known["pool"] is not None:
            known["pool"] = Pool(*map(constant, known["pool"]))
        features = with_stand_ins(rows["features"], known["drawn"], stand_in, self.backend.xp)
        kept = {name: value for name, value in rows.items() if name not in self.item_keys}
        return Retrieval(**{**kept, "features": features}, **known)

    def loss_from_negatives(
        self,
        query_embeddings: Array,
        pos_doc_embeddings: Array,
        neg_doc_embeddings: Array,
        retrieval: Retrieval,
        *,
        hard_negative_embeddings: Array | None = None,
        sample_weight: Array | None = None,
    ) -> CacheLossReturn:
        """Return the loss from embeddings of `retrieval.features`: phase two. Differentiable.

        query_embeddings, pos_doc_embeddings: (B, D); neg_doc_embeddings: (B * S, D)
        hard_negative_embeddings: (B, H, D), negatives of each query that compete exactly, with
                                  gradients; they do not enter the cache, and those that are not
                                  finite do not count
        sample_weight:            (B,) factors on the queries' losses, before they are reduced
        """
        backend = self.backend
        check_retrieval(
            retrieval,
            backend,
            pool=self.estimator != "paper",
            readout=self.estimator == "exact_query",
            others=self.in_batch_negatives,
        )
        (rows, draws), like = retrieval.drawn.shape, retrieval.stale_embeddings
        total, width = None if rows is None else rows * draws, like.shape[1]
        given = [
            embeddings_of(array, shape, what, backend, like=like)
            for what, array, shape in (
                ("query_embeddings", query_embeddings, (rows, width)),
                ("pos_doc_embeddings", pos_doc_embeddings, (rows, width)),
                ("the item network's output", neg_doc_embeddings, (total, width)),
                ("hard_negative_embeddings", hard_negative_embeddings, (rows, "H", width)),
            )
            if array is not None or what != "hard_negative_embeddings"
        ]
        if sample_weight is not None:
            what, advice = "sample_weight", "One factor for each query."
            sample_weight = array_of(sample_weight, (rows,), what, backend, advice)
            check_device(sample_weight, like, what, backend)
            if dtype_kind(sample_weight.dtype) not in {"floating", "integer", "bool"}:
                raise DTypeError(
                    f"sample_weight has dtype {dtype_name(sample_weight.dtype)}: expected floating "
                    "factors."
                )
        embedded = self._embedded(retrieval, *given, *[None] * (4 - len(given)))
        scorer = self._scorer(*embedded[:3], retrieval.stale_embeddings)
        # Raised once, so that what each of their uses adds to a gradient is summed up wide, and
        # rounded to the towers' dtype once.
        embedded = Embedded(
            *(None if each is None else cast(each, scorer.dtype, backend.xp) for each in embedded)
        )
        found = estimate(
            embedded,
            retrieval,
            scorer,
            backend,
            estimator=self.estimator,
            staleness_correction=self.staleness_correction,
        )
        training, interpretable = found.training, found.interpretable
        if sample_weight is not None:
            sample_weight = cast(sample_weight, scorer.dtype, backend.xp)
            training, interpretable = training * sample_weight, interpretable * sample_weight
        training, reduced = (self._reduce(each, retrieval) for each in (training, interpretable))
        return CacheLossReturn(
            training_loss=training,
            interpretable_loss=reduced,
            **self._refresh(retrieval, found.fresh, found.finite),
            staleness=self._reduce(found.staleness, retrieval),
            # A constant, and a difference that is exactly zero whatever the surrogate's magnitude.
            loss=reduced + (training - backend.stop_gradient(training)),
            metrics=found.metrics,
        )

    def __call__(
        self,
        doc_network: Callable[[dict[str, Array]], Array],
        query_embeddings: Array,
        pos_doc_embeddings: Array,
        cache: NegativeCache | Mapping[str, NegativeCache],
        *,
        pos_features: Mapping[str, Array] | None = None,
        positive_ids: Array | None = None,
        hard_negative_embeddings: Array | None = None,
        sample_weight: Array | None = None,
        noise: Array | None = None,
    ) -> CacheLossReturn:
        """Retrieve, embed what was drawn with `doc_network`, and return the loss.

        See the two phases for the arguments; the cache is not changed. Raises KeysError,
        ShapeError, DTypeError, CapacityError or OptionError before `doc_network` is called, or
        ShapeError on its output.
        """
        _check_positives(query_embeddings, pos_doc_embeddings)
        check_function(doc_network, "doc_network", "a function of features")
        with self.undone_on_error():
            retrieval = self.retrieve(
                query_embeddings,
                cache,
                pos_features=pos_features,
                positive_ids=positive_ids,
                noise=noise,
            )
            negatives = doc_network(retrieval.features)
            return self.loss_from_negatives(
                query_embeddings,
                pos_doc_embeddings,
                negatives,
                retrieval,
                hard_negative_embeddings=hard_negative_embeddings,
                sample_weight=sample_weight,
            )

    def undone_on_error(self) -> AbstractContextManager[None]:
        """Return a context that undoes its draws if an error passes it."""
        undo = [each for each in self._remembered() if each is not None]
        return UndoneOnError(undo) if undo else nullcontext()

    def _remembered(self) -> list[Callable[[], Any] | None]:
        """Return functions that put back what draws change; None for nothing."""
        drawing = (self.generator, getattr(self.retrieval_fn, "generator", None))
        return [self.backend.remember(each) for each in drawing]

    def _embedded(self, retrieval: Retrieval, *embeddings: Array | None) -> Embedded:
        """Return all that a loss needs embedded."""
        del retrieval
        return Embedded(*embeddings)

    def _scorer(self, *arrays: Array) -> Scorer:
        xp, scale, transform = self.backend.xp, self.scale, self.score_transform
        dtype = accumulation_dtype(*arrays, xp=xp)
        if scale is not None and not isinstance(scale, (int, float)):
            scale = partial(scale_for, scale, arrays[0], self.backend)
        if transform is not None:
            transform = partial(transformed, transform, dtype=dtype, backend=self.backend)
        return Scorer(scale, transform, dtype, xp)

    def _reduce(self, values: Array, retrieval: Retrieval) -> Array:
        del retrieval
        if self.reducer is mean:
            return mean(values, xp=self.backend.xp)
        return values if self.reducer is None else reduced(self.reducer, values, self.backend)

    def _refresh(self, retrieval: Retrieval, fresh: Array, finite: Array) -> dict[str, Any]:
        """Return the updated_item_* fields, by cache name where the caches were named."""
        data = {self.embedding_key: fresh}
        if not isinstance(retrieval.slots, dict):
            return {
                "updated_item_data": data,
                "updated_item_indices": retrieval.slots,
                "updated_item_mask": retrieval.owned & finite,
            }
        return {
            "updated_item_data": dict.fromkeys(retrieval.slots, data),
            "updated_item_indices": retrieval.slots,
            "updated_item_mask": {key: mask & finite for key, mask in retrieval.owned.items()},
        }


MOST_DRAWS = 2**31 - 1
"""Draws per query: their positions fit an int32."""


def _positive(number: Any, what: str, most: int | None) -> int:
    """Return a positive int, or raise OptionError."""
    whole = as_whole(number)
    if whole is None or whole < 1:
        raise OptionError(f"{what} is {number!r}: expected a positive int.")
    if most is not None and whole > most:
        raise OptionError(f"{what} is {number}: expected at most {most}.")
    return whole


def _check_positives(query_embeddings: Array, pos_doc_embeddings: Array) -> None:
    for what, array in (
        ("query_embeddings", query_embeddings),
        ("pos_doc_embeddings", pos_doc_embeddings),
    ):
        if not hasattr(array, "shape") or not hasattr(array, "dtype"):
            raise KindError(f"{what} is a {type(array).__name__}: expected an array (B, D).")
    check_shape(
        pos_doc_embeddings,
        shape_of(query_embeddings, "query_embeddings"),
        "pos_doc_embeddings",
        "One positive item for each query.",
    )
