"""The cache classification loss: cross-entropy against everything in the cache.

The loss is -log of the positive's probability in the softmax over the positive and every row of
the cache. Its value comes from stale scores; its gradient from the few rows that were drawn and
re-embedded. `retrieve` and `loss_from_negatives` are the two phases of calling it.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

from negcache_core.arrays._array import Array
from negcache_core.arrays.backend import NUMPY, Backend
from negcache_core.arrays.numerics import mean
from negcache_core.arrays.rollback import UndoneOnError
from negcache_core.arrays.validation import check_field_names, check_flag, check_function
from negcache_core.cache.named import Caches
from negcache_core.cache.state import NegativeCache
from negcache_core.losses import options
from negcache_core.losses.callbacks import check_scale
from negcache_core.losses.estimators import check_estimator
from negcache_core.losses.inputs import check_pairs
from negcache_core.losses.network import embedded_by
from negcache_core.losses.phases import check_own, draw_negatives, loss_of
from negcache_core.losses.results import CacheLoss, CacheLossReturn
from negcache_core.losses.words import loss_in_words
from negcache_core.retrieval.placement import HERE, Placement
from negcache_core.retrieval.result import Retrieval
from negcache_core.retrieval.top_k import check_top_k


class CacheClassificationLoss(CacheLoss):
    """Cross-entropy of the positive against the positive and every written row of the cache.

    For each query, with s+ the positive's score, t_j the stale score of slot j, and j drawn from
    softmax(t), the value is log(exp(s+) + sum_j exp(t_j)) - s+, and the gradient is that of
    (1 - p+) (s_j - s+).

    embedding_key:   the cache field that holds embeddings (D,)
    data_keys:       the fields that the item network takes
    score_transform: an elementwise function of scores; it may hold a trained temperature
    top_k:           compete only against the best of each of k contiguous groups of slots. This
                     changes the objective: it is no longer the cross-entropy over all slots.
    reducer:         how to reduce values (B,), by default to their mean; None: per-query values
    retrieval_fn:    scores (B, C) -> slots (B, 1), in place of softmax sampling; biased in general
    scale:           factor on the dot products, before score_transform: a number, a scalar tensor
                     that may be trained, or a function of no arguments that returns one
    estimator:       "paper", "shared" or "exact_query": see docs/concepts.md
    num_samples:     S, draws per query, with replacement
    in_batch_negatives: also compete against the batch's other positives, exactly and with gradients
    id_key:          one such field: short for id_keys=(id_key,)
    id_keys:         integer fields that identify rows, such as the item, or the query it was a
                     positive of. A row that has the same value as the query in any of them is not
                     its negative: it is not drawn, not counted, on no path.
    group_key:       an integer field; only rows of the query's own group are its negatives
    margin:          leave out rows that score higher than the positive plus this, as they may well
                     be right. For cached rows the stale score counts, after scale and
                     score_transform; for in-batch and hard negatives the fresh one.
    log_frequency_key: a floating field (scalar per row), the log of the number of rows to expect of
                     the item among the cache's C and the batch's B: (C + B) times its probability.
                     It is subtracted from the scores of cached rows and in-batch negatives, but not
                     from the positive's, which is there once (the logQ correction).
    max_staleness:   None: rows of every age compete. A number above 0: only rows in a window of
                     ages, which a handler keeps. It reaches to the age at which rows are expected
                     to be this much staler (|stale - fresh|^2 / |fresh|^2) than a row just
                     embedded. It starts at four steps, and widens as the item tower settles.
    staleness_correction: re-weight the drawn rows by their fresh scores, self-normalised
    matryoshka_dims: widths of at most D, in any order. The loss is then the sum of the losses at
                     these widths, of embeddings cut to their first coordinates and divided by their
                     length, so that scores are scale times cosines. D itself counts only if it is
                     named. One pass over the cache scores all widths, and one pool of drawn rows
                     serves them. With "exact_query" the last width reads the cache, and the others
                     work like "shared". `staleness` is that of whole embeddings. `metrics` are
                     those of the last width, except interpretable_loss, a sum over the widths, and
                     effective_negatives, a mean.
    matryoshka_weights: factors on the losses of these widths, above 0; 1 each by default. Queries
                     draw by the widths' softmaxes in proportion to them.
    generator:       where draws come from: None, an int seed, or a random generator of the
                     framework
    tile_bytes:      memory for scores in flight: the cache is scored in tiles that fit it. By
                     default 4 MB on a CPU and 64 MB elsewhere. It changes the speed, never the
                     result.
    fused:           score the cache in one kernel, which keeps scores on the chip: a Triton kernel
                     in PyTorch, a Pallas kernel in JAX, on NVIDIA GPUs. Half rows and int8 rows are
                     multiplied as they are stored, by queries rounded to their dtype. Not for
                     float64, score_transform, top_k, retrieval_fn and matryoshka_dims.

    Raises OptionError, KindError or CapacityError for an argument that cannot work.

    Source: the paper, sections 3.1 and 3.2; published as `losses.CacheClassificationLoss`. Differs
    from it: (1) empty slots neither count nor are drawn; (2) `interpretable_loss` is finite; (3)
    half types are scored and summed in float32; (4) `loss` joins the two losses.

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
    placement: Placement = HERE

    def __init__(
        self,
        embedding_key: str,
        data_keys: Iterable[str],
        score_transform: Callable[[Any], Array] | None = None,
        top_k: int | None = None,
        reducer: Callable[[Any], Array] | None = mean,
        *,
        retrieval_fn: Callable[[Any], Array] | None = None,
        scale: Any = None,
        estimator: str = "paper",
        num_samples: int = 1,
        in_batch_negatives: bool = False,
        id_key: str | None = None,
        id_keys: Iterable[str] | None = None,
        group_key: str | None = None,
        margin: float | None = None,
        log_frequency_key: str | None = None,
        max_staleness: float | None = None,
        staleness_correction: bool = False,
        matryoshka_dims: Iterable[int] | None = None,
        matryoshka_weights: Iterable[float] | None = None,
        generator: Any = None,
        tile_bytes: int | None = None,
        fused: bool = False,
    ) -> None:
        super().__init__()
        self.embedding_key, self.data_keys = check_field_names(embedding_key, data_keys)
        options.check_functions(
            score_transform=score_transform, reducer=reducer, retrieval_fn=retrieval_fn
        )
        self.num_samples = options.positive(num_samples, "num_samples", options.MOST_DRAWS)
        self.tile_bytes = None if tile_bytes is None else options.positive(tile_bytes, "tile_bytes")
        self.score_transform = score_transform
        self.top_k = check_top_k(top_k)
        self.reducer = reducer
        self.retrieval_fn = retrieval_fn
        self.prefixes = options.check_matryoshka(
            matryoshka_dims,
            matryoshka_weights,
            estimator,
            top_k=top_k,
            retrieval_fn=retrieval_fn,
            score_transform=score_transform,
        )
        self.fused = options.check_fused(
            fused,
            self.backend,
            top_k=self.top_k,
            retrieval_fn=retrieval_fn,
            score_transform=score_transform,
            matryoshka_dims=self.prefixes,
        )
        self.scale = check_scale(scale, self.backend)
        self.staleness_correction = check_flag(staleness_correction, "staleness_correction")
        self.in_batch_negatives = check_flag(in_batch_negatives, "in_batch_negatives")
        self.estimator = check_estimator(
            estimator,
            transform=score_transform is not None,
            top_k=top_k is not None,
            retrieval_fn=retrieval_fn is not None,
            correction=self.staleness_correction,
        )
        options.check_item_fields(group_key=group_key, log_frequency_key=log_frequency_key)
        self.id_keys, self.margin = options.id_fields(id_key, id_keys), options.check_margin(margin)
        self.max_staleness = options.check_max_staleness(max_staleness)
        self.group_key, self.log_frequency_key = group_key, log_frequency_key
        self.generator = self.backend.make_generator(generator)

    def __repr__(self) -> str:
        fields = f"{self.embedding_key} of {' and '.join(self.data_keys)}"
        return f"{type(self).__name__}({fields}: {loss_in_words(self)})"

    @property
    def in_training(self) -> bool:
        """Whether a call draws from the generator: an adapter's modules know."""
        return True

    @property
    def id_key(self) -> str | None:
        """The first of id_keys, or None."""
        return self.id_keys[0] if self.id_keys else None

    @property
    def matryoshka_dims(self) -> tuple[int, ...] | None:
        """The widths at which embeddings are compared, ascending; None for their own."""
        return None if self.prefixes is None else self.prefixes.widths

    @property
    def matryoshka_weights(self) -> tuple[float, ...] | None:
        """The factors on the losses of `matryoshka_dims`, in their order; None for 1 each."""
        weights = () if self.prefixes is None else self.prefixes.weights
        return None if set(weights) <= {1.0} else weights

    @property
    def item_keys(self) -> tuple[str, ...]:
        """The fields of items that retrieval reads, other than `data_keys`."""
        return tuple(filter(None, (*self.id_keys, self.group_key, self.log_frequency_key)))

    def retrieve(
        self,
        query_embeddings: Array,
        cache: NegativeCache | Mapping[str, NegativeCache],
        *,
        pos_features: Mapping[str, Array] | None = None,
        positive_ids: Array | Mapping[str, Array] | None = None,
        pos_doc_embeddings: Array | None = None,
        noise: Array | None = None,
    ) -> Retrieval:
        """Draw negatives: the first phase. No gradient flows, and nothing is embedded.

        query_embeddings: (B, D), one row per query
        cache:            a NegativeCache, or a dict of named ones that count as one
        pos_features:     field -> (rows, …), features of the positives. They stand in where no slot
                          is usable, so that the encoder never sees the zeros of an unwritten slot.
                          With id_keys, group_key or log_frequency_key these fields too, (B,).
        positive_ids:     (B, P) integers, all items that are positives of a query, in the first of
                          id_keys; or a dict of such arrays by key. By default the value of its one
                          positive. Pad rows by repeating an id, or with the id of no item.
        pos_doc_embeddings: (B, D), needed only with a margin
        noise:            (B, S, 2) floating uniforms in [0, 1); None: drawn from the generator
        """
        given = (pos_features, positive_ids, pos_doc_embeddings, noise)
        by_chance = noise is not None or self.in_training
        return draw_negatives(self, query_embeddings, cache, *given, by_chance=by_chance)

    def loss_from_negatives(
        self,
        query_embeddings: Array,
        pos_doc_embeddings: Array,
        neg_doc_embeddings: Array,
        retrieval: Retrieval,
        *,
        hard_negative_embeddings: Array | None = None,
        hard_negative_features: Mapping[str, Array] | None = None,
        competing_scores: Array | None = None,
        sample_weight: Array | None = None,
        constant: Iterable[str] = (),
    ) -> CacheLossReturn:
        """Return the loss from embeddings of `retrieval.features`: the second phase.

        query_embeddings:         (B, D), one row per query
        pos_doc_embeddings:       (B, D), embeddings of the positives
        neg_doc_embeddings:       (B * S, D), embeddings of `retrieval.features`
        retrieval:                what `retrieve` returned
        hard_negative_embeddings: (B, H, D), negatives of each query that compete exactly and with
                                  gradients. They do not enter the cache. Those that are not finite
                                  do not count.
        hard_negative_features:   field -> (B, H) for id_keys and group_key, so that these rules
                                  hold for hard negatives too; without, only the margin leaves some
                                  out
        competing_scores:         (B, n) scores, scale included, of further candidates of each
                                  query, which compete exactly and with gradients; -inf for none.
                                  All others count, whatever the margin. A NaN or +inf among them
                                  makes the query's loss NaN, as an embedding that is not finite
                                  does. Not for a loss with matryoshka_dims.
        sample_weight:            (B,) factors on the queries' losses, before they are reduced
        constant:                 which of "positives", "negatives" and "hard_negatives" are meant
                                  to carry no gradient while the others do

        Raises OptionError if some of the items carry a gradient and others do not, since one
        network embeds all: at once in PyTorch and TensorFlow, in JAX when the loss is
        differentiated. A frozen item network, constant queries, and a loss of constants only are
        fine.
        """
        check_own(self, retrieval)
        return loss_of(
            self,
            query_embeddings,
            pos_doc_embeddings,
            neg_doc_embeddings,
            retrieval,
            hard_negative_embeddings,
            hard_negative_features,
            competing_scores,
            sample_weight,
            constant,
        )

    def __call__(
        self,
        doc_network: Callable[[dict[str, Any]], Array],
        query_embeddings: Array,
        pos_doc_embeddings: Array,
        cache: NegativeCache | Mapping[str, NegativeCache],
        *,
        pos_features: Mapping[str, Array] | None = None,
        positive_ids: Array | Mapping[str, Array] | None = None,
        hard_negative_embeddings: Array | None = None,
        hard_negative_features: Mapping[str, Array] | None = None,
        competing_scores: Array | None = None,
        sample_weight: Array | None = None,
        noise: Array | None = None,
        constant: Iterable[str] = (),
    ) -> CacheLossReturn:
        """Retrieve, embed what was drawn with `doc_network`, and return the loss.

        doc_network: a function of features by field, n rows each, that returns embeddings (n, D)

        The cache is not changed: write the result's updates with `CacheManager.update_cache`, or
        use a CacheLossHandler.

        Raises KeysError, ShapeError, DTypeError, CapacityError or OptionError before `doc_network`
        is called, KindError or KeysError where it cannot take a dict of the data_keys, and
        ShapeError or OptionError for its output.
        """
        check_pairs(query_embeddings, pos_doc_embeddings, cache, self.embedding_key)
        check_function(doc_network, "doc_network", "a function of features")
        with self.guard(cache):
            retrieval = self.retrieve(
                query_embeddings,
                cache,
                pos_features=pos_features,
                positive_ids=positive_ids,
                pos_doc_embeddings=pos_doc_embeddings,
                noise=noise,
            )
            return loss_of(
                self,
                query_embeddings,
                pos_doc_embeddings,
                embedded_by(doc_network, retrieval.features),
                retrieval,
                hard_negative_embeddings,
                hard_negative_features,
                competing_scores,
                sample_weight,
                constant if self.in_training else None,
            )

    def evaluate(
        self,
        doc_network: Callable[[dict[str, Any]], Array] | None,
        query_embeddings: Array,
        pos_doc_embeddings: Array,
        cache: NegativeCache | Mapping[str, NegativeCache],
        *,
        pos_features: Mapping[str, Array] | None = None,
        positive_ids: Array | Mapping[str, Array] | None = None,
        hard_negative_embeddings: Array | None = None,
        hard_negative_features: Mapping[str, Array] | None = None,
        competing_scores: Array | None = None,
        sample_weight: Array | None = None,
        constant: Iterable[str] = (),
    ) -> CacheLossReturn:
        """Return the loss without using a generator; its value does not depend on draws.

        doc_network: a function as in the call; None: stale embeddings stand in for fresh ones,
                     which only changes metrics
        constant:    as in the call; it makes no difference here, as nothing learns

        It raises what the call raises.
        """
        del constant
        check_pairs(query_embeddings, pos_doc_embeddings, cache, self.embedding_key)
        if doc_network is not None:
            check_function(doc_network, "doc_network", "a function of features, or None")
        given = (pos_features, positive_ids, pos_doc_embeddings, None)
        retrieval = draw_negatives(self, query_embeddings, cache, *given, by_chance=False)
        drawn = retrieval.stale_embeddings
        return loss_of(
            self,
            query_embeddings,
            pos_doc_embeddings,
            drawn if doc_network is None else embedded_by(doc_network, retrieval.features),
            retrieval,
            hard_negative_embeddings,
            hard_negative_features,
            competing_scores,
            sample_weight,
        )

    def undone_on_error(self) -> UndoneOnError:
        """Return a context that undoes its draws if an error passes it."""
        drawing = (self.generator, getattr(self.retrieval_fn, "generator", None))
        undo = [self.backend.remember(each) for each in drawing if each is not None]
        return UndoneOnError([*undo, self.placement.remember()])

    def guard(self, cache: Any) -> AbstractContextManager[None]:
        """Undo draws on an error; a handler, whose Caches these are, does so for its whole step."""
        return nullcontext() if isinstance(cache, Caches) else self.undone_on_error()
