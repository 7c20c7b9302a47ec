"""The loss: MultipleNegativesRankingLoss against everything in a cache.

More than 300 lines, because half of them are for users: the docstring, and the options.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import negcache_torch as negcache
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from negcache_core.arrays.validation import check_flag

from ._calls import Embedder, Rows, embed
from ._contents import TEXT
from ._datasets import DATASET, number_of_batch
from ._directions import ANCHOR, DOCUMENT, Batch, Directions, reverse
from ._item_calls import embedder_of
from ._items import NUMBER, ItemRows, numbers_in, packed, rows_of
from ._known import RING, RING_FIELDS, Ids, Known, enters, known_of
from ._options import CITATION, checked_scale, processes
from ._slots import slot_bytes, tell_cost
from ._tokens import ID
from ._wrappers import bare, may_route, refuse_wrappers

_EMBEDDING = "embedding"


class NegativeCacheLoss(nn.Module):
    """Cross-entropy of each anchor's positive against a cache of texts; for the trainer's `loss`.

    model:              a SentenceTransformer that takes positives and negatives as tokens; with
                        features="index", as anything it likes
    cache_size:         C, the number of texts that the cache holds, for all processes together
    scale:              factor on the cosine similarities, the inverse of the temperature
    estimator:          "exact_query", "shared" or "paper": see docs/concepts.md
    num_samples:        S, how many cached texts each anchor draws, and the model embeds, in a step
    in_batch_negatives: also compete against the batch's other positives, exactly and with gradients
    max_staleness:      let rows compete up to the age at which they are expected to be this much
                        staler than a row just embedded; None: at every age
    staleness_correction: re-weight the drawn rows by their fresh scores, self-normalised
    matryoshka_dims:    widths, which need not include D. The loss is then the sum of the losses at
                        these widths, of embeddings cut to their first coordinates.
    matryoshka_weights: factors on these losses; 1 each by default
    mini_batch_size:    how many texts the model takes at a time, as in the cached losses: only
                        their activations are in memory, and the backward pass computes them again.
                        Loss and gradient are those of the whole batch, to rounding. None: all at
                        once
    max_length:         the most tokens of a text, or a dict of those by task, as in the training
                        arguments; by default the model's max_seq_length
    dtype:              the dtype in which the cache stores embeddings: a floating one, or int8;
                        also by name
    fused:              score the cache in one kernel; it needs an NVIDIA GPU, see
                        CacheClassificationLoss
    generator:          where draws come from: None, an int seed, or a torch.Generator
    group_by_dataset:   let only texts of an anchor's own data set compete with it
    directions:         what competes besides an anchor's documents, as in
                        MultipleNegativesRankingLoss; see below
    partition_mode:     in which softmax it competes, as in MultipleNegativesRankingLoss
    own_loop:           True in a training loop of your own that saves `loss.state_dict()`
    features:           "content": a slot holds a text's tokens; "index": it holds the number of an
                        item, whose features are made again by the model when it is drawn
    items:              number -> what the model's preprocess takes, such as a list of texts or a
                        Dataset's column of images; with features="index"
    prompt:             the prompt with which the items' columns are made, or a dict of those by
                        task, in a training loop of your own; a trainer's columns carry theirs
    check_items:        compare a row of each column with its item, each step

    Columns are those of MultipleNegativesRankingLoss: anchor, positive, and any number of negatives
    of the anchor. Negatives compete with their own anchor, exactly. They enter the cache along with
    the positives, so later batches meet them too. A text has one slot, however often it comes, and
    one more for each other prompt or task that it comes with.

    What never opposes an anchor, in the batch or in the cache: its positives, of this batch or an
    earlier one, and the anchor itself. So symmetric data, and anchors with several positives, need
    no batch sampler. Texts that differ only in their prompt count as equal. A row remembers the
    last four anchors whose positive it was, with its own prompt; a fifth makes it forget the first.
    An explicit negative that is a positive of its anchor, or the anchor, does not count; one given
    twice counts once. A text without content, such as padding for missing negatives, is no item: it
    does not count and does not enter the cache. A row whose anchor or positive is empty has no
    loss. The mean is over the other rows, and `cache_empty` in the log counts the empty ones.

    Further directions bring more negatives from the batch and from the cache, in which anchors then
    share the slots with documents. No anchor opposes another that has a positive in common with it,
    nor a document that is its positive; no document opposes one of the same anchor. All explicit
    negatives of the batch then compete with every anchor. Each step embeds num_samples cached texts
    for each anchor and, with "doc_to_query" or "doc_to_doc", as many for each document.

    With an empty cache and pairs, loss and gradient are those of MultipleNegativesRankingLoss; with
    further directions also with explicit negatives. In evaluation the loss is that against the
    cache as it is; nothing is drawn or written.

    With features="index" a model may take anything: images, audio, texts. The data's column "label"
    has the number of each row's positive, (B,), or the numbers of positive and negatives, (B, 1 +
    H). Two numbers are two items. Equal texts are still no negatives of each other, but equal
    images may be. An anchor that is no text is recognised by its values. In evaluation, where the
    items may be others, the column may be missing.

    Call `keep_cache` with the trainer before `trainer.train()`: a trainer saves its model, but not
    its loss. With several processes the cache is in shards, one for each, and negatives come from
    all of them; in one step some may work on pairs and others on triplets. With `group_by_dataset`,
    a text that two data sets have is stored once for each. Names decide what belongs together, also
    after a resume.

    Raises OptionError where it trains and nothing would save its cache; where it is made in one of
    several processes before they are joined; where a batch does not say which data set it is from;
    where MatryoshkaLoss or AdaptiveLayerLoss wraps it; where a row is not what its number stands
    for; and for directions without "query_to_doc", or others with several processes or with
    features="index". Raises KindError for a model that is no SentenceTransformer or takes no
    tokens.

    Source: the paper, sections 3.1 and 3.2.

    >>> from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    >>> from tokenizers import Tokenizer, models
    >>> tokenizer = Tokenizer(models.WordLevel({"cat": 0, "dog": 1}, "cat"))
    >>> static = StaticEmbedding(tokenizer, embedding_dim=2)
    >>> model = SentenceTransformer(modules=[static], device="cpu")
    >>> loss = NegativeCacheLoss(model, cache_size=4, max_length=8, own_loop=True)
    >>> columns = [model.preprocess(texts) for texts in (["cat"], ["dog"])]
    >>> loss(columns).item(), int((loss.handler.cache.age == 0).sum())
    (0.0, 1)
    """

    def __init__(
        self,
        model: SentenceTransformer,
        cache_size: int,
        scale: float = 20.0,
        *,
        estimator: str = "exact_query",
        num_samples: int = 1,
        in_batch_negatives: bool = True,
        max_staleness: float | None = 0.2,
        staleness_correction: bool = False,
        matryoshka_dims: Iterable[int] | None = None,
        matryoshka_weights: Iterable[float] | None = None,
        mini_batch_size: int | None = None,
        max_length: int | Mapping[str, int] | None = None,
        dtype: torch.dtype | str = torch.float32,
        fused: bool = False,
        generator: Any = None,
        group_by_dataset: bool = False,
        directions: Iterable[str] = ("query_to_doc",),
        partition_mode: str = "joint",
        own_loop: bool = False,
        features: str = "content",
        items: Sequence[Any] | None = None,
        prompt: str | Mapping[str, str] | None = None,
        check_items: bool = True,
    ) -> None:
        super().__init__()
        if not isinstance(model, SentenceTransformer):
            raise negcache.KindError(
                f"the model is a {type(model).__name__}: expected a SentenceTransformer, whose "
                "texts have one dense embedding each."
            )
        if mini_batch_size is not None:
            negcache.in_chunks(partial(embed, model), mini_batch_size)  # raises if it is wrong
        self.model, self.mini_batch_size = model, mini_batch_size
        self.sharded, self.partition_mode = processes() > 1, partition_mode
        self.in_batch_negatives = check_flag(in_batch_negatives, "in_batch_negatives")
        self._directions = Directions.of(
            directions,
            partition_mode,
            correction=staleness_correction,
            cut=matryoshka_dims is not None,
            by_number=features == "index",
            sharded=self.sharded,
        )
        self.directions, plain = self._directions.names, self._directions.plain
        self.rows = rows_of(features, model, items, prompt, max_length, check=check_items)
        self.routes = may_route(model)
        fields = self.rows.specs()
        width: Any = model.get_embedding_dimension()  # the manager refuses None
        groups = {DATASET: negcache.FieldSpec((), torch.int64)} if group_by_dataset else {}
        embedding = negcache.FieldSpec((width,), dtype)
        kinds = self._directions.fields()
        more_ids, group_key = self._directions.keys(DATASET if group_by_dataset else None)
        specs = {**fields, **RING_FIELDS, **kinds, **groups, _EMBEDDING: embedding}
        manager = negcache.CacheManager(specs, cache_size, unique_key=ID).storing(_EMBEDDING)
        if max_length is None and self.rows.length is not None:
            tell_cost(manager.specs, cache_size, self.rows.length)
        self.slot_bytes = slot_bytes(manager.specs)
        data_keys = tuple(key for key in fields if key != ID)
        kind = "DistributedCacheClassificationLoss" if self.sharded else "CacheClassificationLoss"
        self.handler = negcache.CacheLossHandler(
            manager,
            getattr(negcache, kind)(
                _EMBEDDING,
                data_keys,
                scale=checked_scale(scale),
                estimator=estimator,
                num_samples=num_samples,
                in_batch_negatives=in_batch_negatives and plain,
                id_keys=tuple(key for key in (TEXT, NUMBER, *RING, *more_ids) if key in specs),
                **({} if plain else {"reducer": None}),
                group_key=group_key,
                max_staleness=max_staleness,
                staleness_correction=staleness_correction,
                matryoshka_dims=matryoshka_dims,
                matryoshka_weights=matryoshka_weights,
                generator=generator,
                fused=fused,
            ),
            _EMBEDDING,
            data_keys,
            new_items_filter=enters,
        )
        self.own_loop, self.group_by_dataset = own_loop, group_by_dataset
        self.dataset_name: str | None = None  # of the next batch; set by keep_cache
        self.report: Callable[[dict[str, Tensor]], None] | None = None  # set by keep_cache

    @property
    def metrics(self) -> dict[str, Tensor]:
        """The last training step's scalars by name: see docs/metrics.md.

        And `empty`: how many rows had an empty anchor or positive.
        """
        return self.handler.metrics

    @property
    def temperature(self) -> float:
        """The temperature: the inverse of the scale."""
        return 1.0 / self.handler.cache_loss.scale

    def forward(
        self, sentence_features: Iterable[Mapping[str, Any]], labels: Tensor | None = None
    ) -> Tensor:
        """Return the loss of a batch; in training, update the cache.

        sentence_features: the features of each column's B texts
        labels:            with features="index" the numbers of the items, (B,) or (B, 1 + H)
        """
        anchor, *columns = sentence_features
        if not columns:
            raise negcache.KeysError(
                "the data has one column: expected anchor, positive, and any number of negatives."
            )
        learning = bare(self.model).training and torch.is_grad_enabled()
        if learning and self.report is None and not self.own_loop:
            raise negcache.OptionError(
                "a trainer saves its model but not its loss, so the cache would be lost with "
                "its checkpoints: call keep_cache(trainer) before trainer.train(). In your own "
                "training loop, make the loss with own_loop=True, and save loss.state_dict()."
            )
        refuse_wrappers(self.model)
        handler = self.handler
        rows = packed(self.rows, columns, labels, self.model, handler.cache, learning=learning)
        known = self._known_of(Ids(self.rows.anchors(anchor, rows), rows[ID], rows[TEXT]), rows)
        embedder = self._embedder(columns)
        queries = embedder.anchors(anchor)
        if not self._directions.plain:
            own = packed(self.rows, [anchor], None, self.model, handler.cache, learning=learning)
            return self._in_directions(queries, own, rows, known, learning=learning)
        rows |= known.labels
        count = len(queries)
        positives = {key: value[:count] for key, value in rows.items()}
        weight = known.weight(queries.dtype)
        if not learning:
            items = embedder.items(rows, queries)
            hard = known.negatives(items)
            result = handler.evaluate(
                None,
                queries,
                items[:count],
                positives,
                positive_ids=known.own,
                sample_weight=weight,
                **hard,
            )
            return result.loss
        found = handler.retrieve(queries, positives, positive_ids=known.own)
        # One call of the model per kind for all texts except the anchors, which are shorter.
        inputs = {key: torch.cat([rows[key], found.features[key]]) for key in handler.data_keys}
        embeddings = embedder.items(inputs, queries)
        items, drawn = embeddings.tensor_split([len(rows[ID])])
        hard = known.negatives(items)
        result = handler.compute_loss(
            queries, items[:count], drawn, found, sample_weight=weight, **hard
        )
        self._commit(result, items, rows, known)
        return result.loss

    def get_config_dict(self) -> dict[str, Any]:
        """Return the loss's options, for the model card."""
        loss = self.handler.cache_loss
        names = (
            *("scale", "estimator", "num_samples", "max_staleness", "staleness_correction"),
            *("matryoshka_dims", "matryoshka_weights"),
        )
        return {
            "cache_size": self.handler.cache_manager.cache_size,
            **{name: getattr(loss, name) for name in names},
            "in_batch_negatives": self.in_batch_negatives,
            "directions": self.directions,
            "partition_mode": self.partition_mode,
            "similarity_fct": "cos_sim",
            "mini_batch_size": self.mini_batch_size,
            "max_length": self.rows.length,
            **self.rows.told(),
            "group_by_dataset": self.group_by_dataset,
        }

    @property
    def citation(self) -> str:
        """The paper's citation in BibTeX, for the model card."""
        return CITATION

    def extra_repr(self) -> str:
        """Return what `print(loss)` tells beside the handler's lines."""
        told = "".join(f"{key}={value!r}, " for key, value in self.rows.told().items())
        return f"{told}{self.slot_bytes:,} bytes a slot"

    def _in_directions(
        self, queries: Tensor, anchors: Rows, rows: Rows, known: Known, *, learning: bool
    ) -> Tensor:
        back = self._known_of(reverse(anchors, rows[TEXT][: len(queries)]), {})
        rows |= known.labels | self._directions.labels(rows, DOCUMENT)
        anchors |= back.labels | self._directions.labels(anchors, ANCHOR)
        items = partial(self._embedder(()).items, queries=queries)
        batch = Batch(queries, items(rows), rows, anchors, known, back, self.in_batch_negatives)
        loss, result = batch.loss(self._directions, self.handler, items if learning else None)
        if learning:
            self._commit(result, *batch.stored(self._directions), known)
        return loss

    def _commit(self, result: Any, items: Tensor, rows: dict[str, Tensor], known: Known) -> None:
        self.handler.commit(result, items, rows)
        self.handler.metrics["empty"] = (~known.sound).sum().to(items.dtype)
        if self.report is not None:
            self.report(self._logged())

    def _known_of(self, ids: Ids, rows: Mapping[str, Tensor]) -> Known:
        labels = numbers_in(rows)
        if self.group_by_dataset:
            number = number_of_batch(self.dataset_name)
            ids = ids.of_dataset(number)
            labels |= {DATASET: torch.full_like(ids.slots, number)}
        handler = self.handler
        placement, xp = handler.cache_loss.placement, handler.backend.xp
        known = known_of(ids, {ID: ids.slots, **labels}, handler.cache, placement, xp)
        known.own.update(
            {key: each[: len(ids.anchors), None] for key, each in numbers_in(rows).items()}
        )
        return known

    def _embedder(self, columns: Sequence[Mapping[str, Any]]) -> Embedder:
        if isinstance(self.rows, ItemRows):
            return embedder_of(self.model, self.rows, self.mini_batch_size, columns)
        return Embedder.of(
            self.model, self.rows, self.mini_batch_size, sharded=self.sharded, routes=self.routes
        )

    def _logged(self) -> dict[str, Tensor]:
        return {
            f"cache_{name}": value.detach()
            for name, value in self.metrics.items()
            if name != "interpretable_loss"  # the trainer logs the loss
        }
