"""The loss: MultipleNegativesRankingLoss against everything in a cache."""

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import negcache_torch as negcache
import torch
import torch.distributed as dist
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from torch.nn import functional

from ._datasets import DATASET, of_dataset
from ._tokens import ID, TokenRows

_EMBEDDING = "embedding"


class NegativeCacheLoss(nn.Module):
    """Cross-entropy of each anchor's positive against a cache of texts; for the trainer's `loss`.

    model:              a SentenceTransformer whose inputs are tokens
    cache_size:         C, texts that the cache holds; of all processes together
    scale:              factor on the cosine similarities, the inverse of the temperature
    estimator:          "exact_query", "shared" or "paper", see `negcache_core.losses.estimators`
    num_samples:        S, cached texts that each anchor draws and the model embeds anew, a step
    in_batch_negatives: whether the batch's other positives compete too, exactly, with gradients
    max_staleness, staleness_correction: see `CacheClassificationLoss`
    max_length:         tokens to store of a text; by default the model's max_seq_length
    dtype:              in which the cache stores embeddings
    generator:          None, an int seed, or a torch.Generator
    group_by_dataset:   whether only texts of an anchor's own data set compete with it
    own_loop:           True in a training loop of your own, which saves `loss.state_dict()`

    Columns are those of MultipleNegativesRankingLoss: anchor, positive, and any number of negatives
    of the anchor. Negatives compete with their own anchor, exactly, and enter the cache beside the
    positives; so later batches meet them too. Texts are told apart by their tokens: one that
    equals an anchor's positive is no negative of it, and has one slot however often it comes.

    With an empty cache and pairs, loss and gradient are those of MultipleNegativesRankingLoss. In
    evaluation the loss is against the cache as it is; nothing is drawn or written.

    Call `keep_cache(trainer)` before `trainer.train()`: a trainer saves its model, not its loss. In
    several processes the cache is in shards, one for each, and negatives are those of all; in one
    step some may be at pairs and others at triplets. With `group_by_dataset` a text that two data
    sets have is stored once for each; names decide what belongs together, also after a resume.

    Raises OptionError where it trains and nothing would save its cache, where it is made in one of
    several processes before they are joined, or where a batch does not say of which data set it
    is; KindError for a model that takes no tokens.
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
        max_length: int | None = None,
        dtype: torch.dtype = torch.float32,
        generator: Any = None,
        group_by_dataset: bool = False,
        own_loop: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.rows = TokenRows.of(model, max_length)
        fields = self.rows.specs()
        width: Any = model.get_embedding_dimension()  # the manager refuses None
        groups = {DATASET: negcache.FieldSpec((), torch.int64)} if group_by_dataset else {}
        specs = {**fields, **groups, _EMBEDDING: negcache.FieldSpec((width,), dtype)}
        data_keys = tuple(key for key in fields if key != ID)
        self.sharded = _processes() > 1
        kind = "DistributedCacheClassificationLoss" if self.sharded else "CacheClassificationLoss"
        self.handler = negcache.CacheLossHandler(
            negcache.CacheManager(specs, cache_size, unique_key=ID),
            getattr(negcache, kind)(
                _EMBEDDING,
                data_keys,
                scale=_checked_scale(scale),
                estimator=estimator,
                num_samples=num_samples,
                in_batch_negatives=in_batch_negatives,
                id_key=ID,
                group_key=DATASET if group_by_dataset else None,
                max_staleness=max_staleness,
                staleness_correction=staleness_correction,
                generator=generator,
            ),
            _EMBEDDING,
            data_keys,
        )
        self.own_loop, self.group_by_dataset = own_loop, group_by_dataset
        self.dataset_name: str | None = None  # of the next batch; set by keep_cache
        self.report: Callable[[dict[str, Tensor]], None] | None = None  # set by keep_cache

    @property
    def metrics(self) -> dict[str, Tensor]:
        """The last training step's scalars; see `negcache_core.losses.metrics.step_metrics`."""
        return self.handler.metrics

    @property
    def temperature(self) -> float:
        """The inverse of the scale."""
        return 1.0 / self.handler.cache_loss.scale

    def forward(
        self, sentence_features: Iterable[Mapping[str, Any]], labels: Tensor | None = None
    ) -> Tensor:
        """Return the loss of a batch, and in training update the cache.

        sentence_features: the features of each column's B texts; labels: not used
        """
        del labels
        anchor, *columns = sentence_features
        if not columns:
            raise negcache.KeysError(
                "the data has one column: expected anchor, positive, and any number of negatives."
            )
        learning = self._bare_model().training and torch.is_grad_enabled()
        if learning and self.report is None and not self.own_loop:
            raise negcache.OptionError(
                "a trainer saves its model and not its loss, so the cache would be lost with its "
                "checkpoints: call keep_cache(trainer) before trainer.train(). In a training loop "
                "of your own make the loss with own_loop=True, and save loss.state_dict()."
            )
        queries = self._embed(anchor)
        rows, facts = self.rows.pack(columns)
        if self.group_by_dataset:
            rows = of_dataset(rows, self._named_dataset())
        count = len(queries)
        ids = rows[ID].reshape(-1, count).T
        positives = {key: value[:count] for key, value in rows.items()}
        told = _told(rows, count) if len(columns) > 1 else None
        known = self._as_wide_as_others(ids)
        if not learning:
            items = self._embed(self.rows.unpack(rows, facts))
            result = self.handler.evaluate(
                None,
                queries,
                items[:count],
                positives,
                positive_ids=known,
                hard_negative_embeddings=_hard(items, count, len(columns)),
                hard_negative_features=told,
            )
            return result.loss
        found = self.handler.retrieve(queries, positives, positive_ids=known)
        keys = self.handler.data_keys
        # One forward pass for all texts but the anchors, which are shorter.
        inputs = {key: torch.cat([rows[key], found.features[key]]) for key in keys}
        embedded = self._embed(self.rows.unpack(inputs, facts))
        items, drawn = embedded.tensor_split([ids.numel()])
        hard = _hard(items, count, len(columns))
        result = self.handler.compute_loss(
            queries,
            items[:count],
            drawn,
            found,
            hard_negative_embeddings=hard,
            hard_negative_features=told,
        )
        self.handler.commit(result, items, rows)
        if self.report is not None:
            self.report(self._logged())
        return result.loss

    def get_config_dict(self) -> dict[str, Any]:
        """Return what the model card tells of the loss."""
        loss = self.handler.cache_loss
        names = (
            *("scale", "estimator", "num_samples", "in_batch_negatives"),
            *("max_staleness", "staleness_correction"),
        )
        return {
            "cache_size": self.handler.cache_manager.cache_size,
            **{name: getattr(loss, name) for name in names},
            "similarity_fct": "cos_sim",
            "max_length": self.rows.length,
            "group_by_dataset": self.group_by_dataset,
        }

    @property
    def citation(self) -> str:
        """The paper, in BibTeX, for the model card."""
        return """
@inproceedings{lindgren2021negativecache,
    title = "Efficient Training of Retrieval Models using Negative Cache",
    author = "Lindgren, Erik and Reddi, Sashank and Guo, Ruiqi and Kumar, Sanjiv",
    booktitle = "Advances in Neural Information Processing Systems",
    volume = "34",
    year = "2021",
}
"""

    def _embed(self, features: Mapping[str, Any]) -> Tensor:
        """Return normalised embeddings (n, D), at least as wide as float32."""
        rows = self.model(dict(features))["sentence_embedding"]  # modules write into what they get
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        return functional.normalize(rows, dim=1)

    def _as_wide_as_others(self, ids: Tensor) -> Tensor:
        """Repeat the positive's id in ids (B, P) up to the largest P of any process.

        In a step one may be at pairs and another at triplets.
        """
        if not self.sharded:
            return ids
        widest = torch.tensor(ids.shape[1], device=ids.device)
        dist.all_reduce(widest, dist.ReduceOp.MAX)
        spare = int(widest) - ids.shape[1]
        return torch.cat([ids, ids[:, :1].expand(-1, spare)], dim=1)

    def _named_dataset(self) -> str:
        if self.dataset_name is None:
            raise negcache.OptionError(
                "the loss has group_by_dataset=True, and the batch does not say of which data set "
                "it is: give the trainer a DatasetDict, before keep_cache(trainer), also to "
                "evaluate; in a training loop of your own set loss.dataset_name."
            )
        return self.dataset_name

    def _bare_model(self) -> SentenceTransformer:
        """Return the model without what the trainer has put around it."""
        return next(each for each in self.model.modules() if isinstance(each, SentenceTransformer))

    def _logged(self) -> dict[str, Tensor]:
        return {
            f"cache_{name}": value.detach()
            for name, value in self.metrics.items()
            if name != "interpretable_loss"  # the trainer logs the loss
        }


def _hard(items: Tensor, count: int, columns: int) -> Tensor | None:
    """Return the explicit negatives (B, H, D) among a batch's items, column after column."""
    return items.unflatten(0, (-1, count))[1:].transpose(0, 1) if columns > 1 else None


def _told(rows: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Return by what explicit negatives (B, H) are told apart.

    Their ids are those of the positive where they equal it, else of no text. From the cache no text
    of a row is drawn for its anchor; in the row, the negatives are to count that the positive is
    not among.
    """
    columns = {key: rows[key].reshape(-1, count).T for key in (ID, DATASET) if key in rows}
    positive, negatives = columns[ID][:, :1], columns[ID][:, 1:]
    told = {key: column[:, 1:] for key, column in columns.items()}
    return {**told, ID: torch.where(negatives == positive, negatives, _NO_TEXT)}


_NO_TEXT = torch.iinfo(torch.int64).min


def _processes() -> int:
    """Return how many processes train together; raise if they are not joined yet."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise negcache.OptionError(
            "the loss is made in one of several processes before they are joined: make the "
            "SentenceTransformerTrainingArguments, which join them, before the loss."
        )
    return 1


def _checked_scale(scale: Any) -> float:
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not scale > 0:
        raise negcache.OptionError(f"scale is {scale!r}: expected a positive number.")
    return float(scale)
