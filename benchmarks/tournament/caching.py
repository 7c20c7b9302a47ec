"""Training with a negative cache, by its defaults but for the options."""

from typing import Any

import negcache_torch as negcache
import torch
from torch import Tensor

from .drift import DriftMap
from .in_batch import in_batch_loss
from .method import FORWARD_ONLY, Batch, Phase, Setting, Training
from .towers import WIDTH

LATE = 0.5  # of the budget: from here on there are `late_draws`


def cache(setting: Setting) -> Training:
    """Cross-entropy against everything in a negative cache.

    prefill:       whether the cache is embedded full from the training items before it is used
    refresh:       rows to embed anew, forward only, before each step
    warm_in_batch: share of the budget in which the in-batch loss is trained first. Its items enter
                   the cache, unless there is a prefill afterwards.
    late_draws:    draws a query in the second half of the budget, in place of `num_samples`
    drift:         True, or a ridge: the queries that draw are corrected for how the cached rows
                   have moved since, see `DriftMap`. "staleness" is then what is left of it.

    All other options are NegativeCacheLoss's.
    """
    return _CacheTraining(setting).training()


class _CacheTraining:
    def __init__(self, setting: Setting) -> None:
        self.setting, self.model, options = setting, setting.model, dict(setting.options)
        self.prefilled: bool = options.pop("prefill", False)
        self.refreshed: int = options.pop("refresh", 0)
        self.warm: float = options.pop("warm_in_batch", 0.0)
        self.late_draws: int | None = options.pop("late_draws", None)
        drift: bool | float = options.pop("drift", False)
        self.drift = None if drift is False else DriftMap(*(() if drift is True else (drift,)))
        if not 0 <= self.warm < (1 if self.late_draws is None else LATE):
            raise SystemExit(f"warm_in_batch {self.warm} leaves no budget for what follows.")
        self.loss_fn = negcache.NegativeCacheLoss(
            setting.cache_size,
            {"tokens": torch.from_numpy(setting.task.items[:1])},
            embedding=WIDTH,
            scale=self.model.scale,
            labels={"id": torch.zeros(1, dtype=torch.int64)},
            id_keys=("id",),  # a query's own item, cached earlier, is no negative of it
            generator=setting.seed,
            **options,
        )
        self.drift_shown: dict[str, float] = {}

    def training(self) -> Training:
        phases, batch = [], self.setting.batch
        if self.warm:
            told = (lambda *_: None) if self.prefilled else self.insert
            phases.append(Phase(in_batch_loss(self.model, told), 2 * batch, self.warm))
        early = (1.0 if self.late_draws is None else LATE) - self.warm
        phases.append(Phase(self.loss, self.calls(self.loss_fn.cache_loss.num_samples), early))
        if self.prefilled:
            known = torch.unique(
                torch.from_numpy(self.setting.task.item_of[self.setting.task.train])
            )
            generator = torch.Generator().manual_seed(self.setting.seed)
            order = torch.randperm(len(known), generator=generator)
            chosen = known[order[: self.setting.cache_size]]
            phases[-1] = phases[-1]._replace(
                enter=lambda: self.prefill(chosen), price=FORWARD_ONLY * len(chosen)
            )
        if self.late_draws is not None:
            late = self.calls(self.late_draws)
            phases.append(Phase(self.loss, late, 1 - LATE, self.draw_more))
        return Training(phases, self.shown)

    def calls(self, draws: int) -> float:
        return (2 + draws) * self.setting.batch + FORWARD_ONLY * self.refreshed

    def prefill(self, chosen: Tensor) -> None:
        tokens = torch.from_numpy(self.setting.task.items)[chosen]
        self.loss_fn.prefill(
            self.model.embed_items, {"tokens": tokens}, 1024, labels={"id": chosen}
        )

    def draw_more(self) -> None:
        self.loss_fn.cache_loss.num_samples = self.late_draws

    def insert(self, batch: Batch, items: Tensor) -> None:
        """Write the items of a step that drew nothing."""
        nothing = torch.zeros(())
        result = negcache.CacheLossReturn(nothing, nothing, None, None, None, nothing)
        self.loss_fn.commit(result, items, {"tokens": batch.items}, labels={"id": batch.ids})

    def loss(self, batch: Batch) -> Tensor:
        if self.refreshed:
            self.loss_fn.refresh(self.model.embed_items, self.refreshed)
        queries, features = self.model.queries(batch.queries), {"tokens": batch.items}
        items, labels = self.model.embed_items(features), {"id": batch.ids}
        if self.drift is None:
            return self.loss_fn(self.model.embed_items, queries, items, features, labels=labels)
        with torch.no_grad():
            moved, gain = self.drift.of_queries(queries)
            gain = gain * self.model.scale()
        retrieval = self.loss_fn.retrieve(moved, features, labels=labels)
        fresh = self.model.embed_items(retrieval.features)
        corrected = self.drift.of_retrieval(retrieval, gain)
        result = self.loss_fn.compute_loss(queries, items, fresh, corrected)
        self.loss_fn.commit(result, items, features, labels=labels)
        drawn = retrieval.drawn.flatten()
        self.drift_shown = self.drift.learn(
            retrieval.stale_embeddings[drawn], fresh.detach()[drawn]
        )
        return result.loss

    def shown(self) -> dict[str, float]:
        metrics: dict[str, Any] = self.loss_fn.metrics
        names = ("staleness", "window", "fill")
        found = {name: float(metrics[name]) for name in names if name in metrics}
        return {**found, **self.drift_shown}
