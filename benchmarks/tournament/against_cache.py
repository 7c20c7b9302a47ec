"""The loss of one direction: one side's texts against a cache of the other side's."""

from collections.abc import Callable
from typing import Any

import negcache_torch as negcache
import torch
from torch import Tensor

from .drift import DriftMap
from .in_batch import check_hard_weight, weighed_mean
from .score_errors import ScoreErrors
from .towers import WIDTH, Tower

PREFILL_BATCH = 1024


class AgainstCache:
    """Cross-entropy of each text's partner against everything in a cache of the partner's side.

    tower:   that of the cached side
    words:   token numbers per text of that side
    options: refresh, drift, residual_mix, hard_weight and stored, see `caching.cache`; all others
             are NegativeCacheLoss's
    """

    def __init__(
        self,
        tower: Tower,
        scale: Callable[[], Tensor],
        words: int,
        size: int,
        seed: int,
        options: dict[str, Any],
    ) -> None:
        self.tower, self.scale = tower, scale
        options = dict(options)
        row = negcache.FieldSpec((WIDTH,), options.pop("stored", "float32"))
        self.refreshed: int = options.pop("refresh", 0)
        self.hard_weight: float = options.pop("hard_weight", 0.0)
        check_hard_weight(self.hard_weight)
        drift: bool | float = options.pop("drift", False)
        self.drift = None if drift is False else DriftMap(*(() if drift is True else (drift,)))
        self.errors = ScoreErrors() if options.pop("residual_mix", False) else None
        if self.errors is not None:  # a field that is subtracted from the scores, whatever its name
            options["log_frequency_key"] = "discount"
        self.loss_fn = negcache.NegativeCacheLoss(
            size,
            {"tokens": torch.zeros(1, words, dtype=torch.int32)},
            embedding=row,
            scale=scale,
            labels=self.labels(torch.zeros(1, dtype=torch.int64)),
            id_keys=("id",),  # a pair with the same item, cached earlier, is not a negative
            generator=seed,
            reducer=None,
            **options,
        )
        self.figures: dict[str, float] = {}

    def labels(self, ids: Tensor) -> dict[str, Tensor]:
        """Return what the cache keeps of texts besides their tokens; ids: (n,) of their items."""
        fresh = {} if self.errors is None else {"discount": torch.zeros(len(ids))}
        return {"id": ids, **fresh}

    def embed(self, features: dict[str, Tensor]) -> Tensor:
        """Map {"tokens": (n, words)}, as the cache stores them, to embeddings (n, WIDTH)."""
        return self.tower(features["tokens"])

    def prefill(self, tokens: Tensor, ids: Tensor) -> None:
        """Embed texts (n, words), forward only, and put them into the cache."""
        self.loss_fn.prefill(self.embed, {"tokens": tokens}, PREFILL_BATCH, labels=self.labels(ids))

    def draw(self, samples: int) -> None:
        """Set how many texts to draw for each from now on."""
        self.loss_fn.cache_loss.num_samples = samples

    def draws(self) -> int:
        """Return how many texts are drawn for each."""
        return self.loss_fn.cache_loss.num_samples

    def insert(self, partners: Tensor, tokens: Tensor, ids: Tensor) -> None:
        """Write the partners of a step that drew nothing."""
        nothing = torch.zeros(())
        result = negcache.CacheLossReturn(nothing, nothing, None, None, None, nothing)
        self.loss_fn.commit(result, partners, {"tokens": tokens}, labels=self.labels(ids))

    def loss(self, texts: Tensor, partners: Tensor, tokens: Tensor, ids: Tensor) -> Tensor:
        """Return the loss of texts (B, WIDTH) with partners (B, WIDTH), which then enter the cache.

        tokens, ids: the partners', (B, words), and their items', (B,)
        """
        if self.refreshed:
            self.loss_fn.refresh(self.embed, self.refreshed)
        features, labels = {"tokens": tokens}, self.labels(ids)
        if self.drift is None and self.errors is None:
            losses = self.loss_fn(self.embed, texts, partners, features, labels=labels)
        else:
            losses = self._corrected(texts, partners, features, labels)
        return weighed_mean(losses, self.hard_weight)

    def _corrected(
        self,
        texts: Tensor,
        partners: Tensor,
        features: dict[str, Tensor],
        labels: dict[str, Tensor],
    ) -> Tensor:
        """Return the losses (B,) from cached scores corrected for drift and errors."""
        constant, scale, cache = texts.detach(), self.scale().detach(), self.loss_fn.cache
        moved, gain = (constant, None) if self.drift is None else self.drift.of_queries(constant)
        if self.errors is not None:
            cache.data["discount"].copy_(self.errors.discounts(cache.age))
        retrieval = self.loss_fn.retrieve(moved, features, labels=labels)
        fresh = self.embed(retrieval.features)
        known = retrieval
        if self.drift is not None:
            known = self.drift.of_retrieval(retrieval, gain * scale)
        result = self.loss_fn.compute_loss(texts, partners, fresh, known)
        self.loss_fn.commit(result, partners, features, labels=labels)
        drawn, now = retrieval.drawn.flatten(), fresh.detach()
        if self.errors is not None:
            asking = constant.repeat_interleave(self.draws(), 0)
            errors = scale * ((known.stale_embeddings - now) * asking).sum(1)
            ages = retrieval.ages[drawn]
            self.figures = {"discount": self.errors.discounts(ages).mean().item()}
            self.errors.learn(ages, errors[drawn])
        if self.drift is not None:
            self.figures |= self.drift.learn(retrieval.stale_embeddings[drawn], now[drawn])
        return result.loss

    def shown(self) -> dict[str, float]:
        """Return the figures of the last step."""
        metrics: dict[str, Any] = self.loss_fn.metrics
        names = ("staleness", "window", "fill")
        found = {name: float(metrics[name]) for name in names if name in metrics}
        return {**found, **self.figures}
