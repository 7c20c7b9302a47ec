"""The ways of training that are compared: each makes a loss for two towers, and has its price."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import negcache_torch as negcache
import torch
from torch import Tensor
from torch.nn import functional

from .task import Task
from .towers import WIDTH, TwoTowers, bags_of

CACHE_SIZES = {"docstrings": 8_192, "nl2bash": 8_192}
OTHER_CACHE_SIZE = 32_768
FORWARD_ONLY = 1 / 3  # of a trained call
FULL_SOFTMAX_ITEMS = 50_000  # more are not embedded at every step


class Batch(NamedTuple):
    """Token numbers of queries and of their items, (B, words), and the items' rows (B,)."""

    queries: Tensor
    items: Tensor
    ids: Tensor


class Setting(NamedTuple):
    """What a loss is made from; `options` are the method's own."""

    model: TwoTowers
    task: Task
    cache_size: int
    seed: int
    options: dict[str, Any]


class Training(NamedTuple):
    """A loss, and what it tells.

    loss:    a batch -> the loss
    start:   what comes before the first step, in encoder calls
    shown:   returns the figures of the last step
    """

    loss: Callable[[Batch], Tensor]
    start: float = 0.0
    shown: Callable[[], dict[str, float]] = dict


class Method(NamedTuple):
    """How to begin a training, and the encoder calls of a step: a function of batch and options."""

    begin: Callable[[Setting], Training]
    calls: Callable[[int, Mapping[str, Any]], float]


def in_batch(setting: Setting) -> Training:
    """Cross-entropy of each query's item against the batch's other items."""
    model = setting.model

    def loss(batch: Batch) -> Tensor:
        scores = model.scale() * model.queries(batch.queries) @ model.items(batch.items).T
        own = torch.eye(len(batch.ids), dtype=torch.bool)
        # Another query's copy of a query's own item is no negative of it.
        scores = scores.masked_fill((batch.ids[:, None] == batch.ids) & ~own, -math.inf)
        return functional.cross_entropy(scores, torch.arange(len(batch.ids)))

    return Training(loss)


def gradient_caching(setting: Setting) -> Training:
    """The same loss and gradient; each text goes through its tower once more, forward only.

    That is what a large batch costs where its activations do not fit. Here they do.
    """
    plain = in_batch(setting).loss

    def loss(batch: Batch) -> Tensor:
        with torch.no_grad():
            setting.model.queries(batch.queries)
            setting.model.items(batch.items)
        return plain(batch)

    return Training(loss)


def memory(setting: Setting) -> Training:
    """Cross-entropy against the batch, and a first-in-first-out memory of embeddings, constants.

    What is usually called a cross-batch memory: its negatives train the query tower alone.
    """
    model, size = setting.model, setting.cache_size
    rows, ids, written = torch.zeros(size, WIDTH), torch.full((size,), -1), 0

    def loss(batch: Batch) -> Tensor:
        nonlocal written
        queries = model.scale() * model.queries(batch.queries)
        items = model.items(batch.items)
        own = torch.eye(len(batch.ids), dtype=torch.bool)
        same = (batch.ids[:, None] == batch.ids) & ~own
        known = slice(0, min(written, size))
        parts = [
            (queries @ items.T).masked_fill(same, -math.inf),
            (queries @ rows[known].clone().T).masked_fill(
                batch.ids[:, None] == ids[known], -math.inf
            ),
        ]
        value = functional.cross_entropy(torch.cat(parts, 1), torch.arange(len(batch.ids)))
        slots = (written + torch.arange(len(items))) % size
        rows[slots], ids[slots] = items.detach(), batch.ids
        written += len(items)
        return value

    return Training(loss)


def cache(setting: Setting) -> Training:
    """Cross-entropy against everything in a negative cache, by its defaults but for the options.

    prefill: whether the cache is embedded full from the training items at the start
    refresh: rows to embed anew, forward only, after each step

    All other options are NegativeCacheLoss's.
    """
    model, task, options = setting.model, setting.task, dict(setting.options)
    prefill, refresh = options.pop("prefill", False), options.pop("refresh", 0)
    items = torch.from_numpy(task.items)
    loss_fn = negcache.NegativeCacheLoss(
        setting.cache_size,
        {"tokens": items[:1]},
        embedding=WIDTH,
        scale=model.scale,
        labels={"id": torch.zeros(1, dtype=torch.int64)},
        id_keys=("id",),  # a query's own item, cached earlier, is no negative of it
        generator=setting.seed,
        **options,
    )
    start = 0.0
    if prefill:
        known = torch.unique(torch.from_numpy(task.item_of[task.train]))
        generator = torch.Generator().manual_seed(setting.seed)
        chosen = known[torch.randperm(len(known), generator=generator)[: setting.cache_size]]
        loss_fn.prefill(model.embed_items, {"tokens": items[chosen]}, 1024, labels={"id": chosen})
        start = FORWARD_ONLY * len(chosen)

    def loss(batch: Batch) -> Tensor:
        features = {"tokens": batch.items}
        if refresh:
            loss_fn.refresh(model.embed_items, refresh)
        return loss_fn(
            model.embed_items,
            model.queries(batch.queries),
            model.embed_items(features),
            features,
            labels={"id": batch.ids},
        )

    def shown() -> dict[str, float]:
        metrics = loss_fn.metrics
        names = ("staleness", "window", "fill")
        return {name: float(metrics[name]) for name in names if name in metrics}

    return Training(loss, start, shown)


def full_softmax(setting: Setting) -> Training:
    """Cross-entropy against every item that is trained on, all embedded anew at each step."""
    model, task = setting.model, setting.task
    known = torch.unique(torch.from_numpy(task.item_of[task.train]))
    if len(known) > FULL_SOFTMAX_ITEMS:
        raise SystemExit(f"full softmax is for at most {FULL_SOFTMAX_ITEMS} items.")
    place = torch.full((len(task.items),), -1)
    place[known] = torch.arange(len(known))
    bags = bags_of(torch.from_numpy(task.items)[known], len(model.items.vectors))

    def loss(batch: Batch) -> Tensor:
        scores = model.scale() * model.queries(batch.queries) @ model.items.embed(bags).T
        return functional.cross_entropy(scores, place[batch.ids])

    return Training(loss)


def _pair(calls: float) -> Callable[[int, Mapping[str, Any]], float]:
    return lambda batch, _: calls * batch


def _cache_calls(batch: int, options: Mapping[str, Any]) -> float:
    drawn = options.get("num_samples", 1)
    return (2 + drawn) * batch + FORWARD_ONLY * options.get("refresh", 0)


METHODS = {
    "in-batch": Method(in_batch, _pair(2)),
    "gradient-caching": Method(gradient_caching, _pair(2 + 2 * FORWARD_ONLY)),
    "memory": Method(memory, _pair(2)),
    "cache": Method(cache, _cache_calls),
    "full-softmax": Method(full_softmax, _pair(2)),  # a ceiling: what it embeds has no price
}
OF_ALL = ("scale", "cache_size")  # options that any method takes
