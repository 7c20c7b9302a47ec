"""Training with a negative cache, with its defaults except for the options."""

import torch
from torch import Tensor

from .against_cache import AgainstCache
from .in_batch import against_batch, check_shares, in_batch_loss
from .method import FORWARD_ONLY, Batch, Phase, Setting, Training

LATE = 0.5  # share of the budget after which there are `late_draws`
OTHER_DRAWS = 100_000  # added to the seed of draws from a cache of queries


def cache(setting: Setting) -> Training:
    """Cross-entropy against everything in a negative cache.

    prefill:         whether the cache is filled from the training items before it is used
    refresh:         rows to re-embed, forward only, before each step
    warm_in_batch:   share of the budget in which the in-batch loss is trained first. Its items
                     enter the cache, unless there is a prefill afterwards.
    late_draws:      draws a query in the second half of the budget, in place of `num_samples`
    drift:           True, or a ridge: the drawing queries are corrected for how the cached rows
                     have moved since, see `DriftMap`. "staleness" is then what remains.
    stored:          the dtype in which the cache stores embeddings
    residual_mix:    whether cached scores are discounted by their measured error, see
                     `ScoreErrors`; with drift, by the error after correction
    hard_weight:     g: each query's loss is weighed by (1 - its item's probability)^g
    symmetric:       share of the loss that is each item's query against the batch's other queries
    other_direction: share of the loss that is each item's query against a cache of queries. It
                     draws as many as the first, each one more encoder call; a cached query of the
                     same item is not a negative. All other options apply to both.

    All other options are NegativeCacheLoss's.
    """
    return _CacheTraining(setting).training()


class _CacheTraining:
    def __init__(self, setting: Setting) -> None:
        self.setting, self.model, options = setting, setting.model, dict(setting.options)
        self.prefilled: bool = options.pop("prefill", False)
        self.warm: float = options.pop("warm_in_batch", 0.0)
        self.late_draws: int | None = options.pop("late_draws", None)
        if not 0 <= self.warm < (1 if self.late_draws is None else LATE):
            raise SystemExit(f"warm_in_batch {self.warm} leaves no budget for what follows.")
        self.symmetric: float = options.pop("symmetric", 0.0)
        self.other: float = options.pop("other_direction", 0.0)
        check_shares(symmetric=self.symmetric, other_direction=self.other)
        self.hard_weight: float = options.get("hard_weight", 0.0)
        task, (size, seed) = setting.task, (setting.cache_size, setting.seed)
        self.items = AgainstCache(
            self.model.items, self.model.scale, task.items.shape[1], size, seed, options
        )
        self.queries: AgainstCache | None = None
        if self.other:
            words, draws = task.queries.shape[1], OTHER_DRAWS + seed
            self.queries = AgainstCache(
                self.model.queries, self.model.scale, words, size, draws, options
            )

    def training(self) -> Training:
        phases, batch = [], self.setting.batch
        if self.warm:
            told = (lambda *_: None) if self.prefilled else self.insert
            warm = in_batch_loss(
                self.model,
                told,
                symmetric=self.symmetric + self.other,
                hard_weight=self.hard_weight,
            )
            phases.append(Phase(warm, 2 * batch, self.warm))
        early = (1.0 if self.late_draws is None else LATE) - self.warm
        phases.append(Phase(self.loss, self.calls(self.items.draws()), early))
        if self.prefilled:
            corpora = self.corpora()
            total = sum(len(ids) for _, _, ids in corpora)
            phases[-1] = phases[-1]._replace(
                enter=lambda: [each.prefill(*texts) for each, *texts in corpora],
                price=FORWARD_ONLY * total,
            )
        if self.late_draws is not None:
            late = self.calls(self.late_draws)
            phases.append(Phase(self.loss, late, 1 - LATE, self.draw_more))
        return Training(phases, self.shown)

    def caches(self) -> list[AgainstCache]:
        return [self.items] if self.queries is None else [self.items, self.queries]

    def calls(self, draws: int) -> float:
        """Return the encoder calls of a step: of its pairs, and of what each cache draws."""
        batch, refreshed = self.setting.batch, FORWARD_ONLY * self.items.refreshed
        return 2 * batch + len(self.caches()) * (draws * batch + refreshed)

    def corpora(self) -> list[tuple[AgainstCache, Tensor, Tensor]]:
        """Return what fills each cache: token numbers, and items' rows."""
        task, size = self.setting.task, self.setting.cache_size
        queries, items, item_of, train = map(
            torch.from_numpy, (task.queries, task.items, task.item_of, task.train)
        )
        known = torch.unique(item_of[train])
        chosen = known[self.shuffled(len(known))[:size]]
        found = [(self.items, items[chosen], chosen)]
        if self.queries is not None:
            rows = train[self.shuffled(len(train))[:size]]
            found.append((self.queries, queries[rows], item_of[rows]))
        return found

    def shuffled(self, count: int) -> Tensor:
        return torch.randperm(count, generator=torch.Generator().manual_seed(self.setting.seed))

    def draw_more(self) -> None:
        for each in self.caches():
            each.draw(self.late_draws)

    def insert(self, batch: Batch, queries: Tensor, items: Tensor) -> None:
        self.items.insert(items, batch.items, batch.ids)
        if self.queries is not None:
            self.queries.insert(queries, batch.queries, batch.ids)

    def loss(self, batch: Batch) -> Tensor:
        queries, items = self.model.queries(batch.queries), self.model.items(batch.items)
        value = self.items.loss(queries, items, batch.items, batch.ids)
        value = (1.0 - self.symmetric - self.other) * value
        if self.symmetric:
            scores = self.model.scale() * items @ queries.T
            value = value + self.symmetric * against_batch(scores, batch.ids, self.hard_weight)
        if self.queries is not None:
            back = self.queries.loss(items, queries, batch.queries, batch.ids)
            value = value + self.other * back
        return value

    def shown(self) -> dict[str, float]:
        found = self.items.shown()
        if self.queries is not None:
            found |= {f"other {name}": value for name, value in self.queries.shown().items()}
        return found
