"""The training methods that are compared; a method starts a training from a setting."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional

from .caching import cache
from .in_batch import in_batch_loss
from .method import FORWARD_ONLY, Batch, Begin, Phase, Setting, Training
from .towers import WIDTH, bags_of

OF_ALL = ("scale", "cache_size")  # options that any method takes
FULL_SOFTMAX_ITEMS = 50_000  # more than this are not embedded at every step


def in_batch(setting: Setting) -> Training:
    """Cross-entropy of each query's item against the batch's other items.

    The options are those of `in_batch_loss`.
    """
    loss = in_batch_loss(setting.model, **setting.options)
    return Training([Phase(loss, 2 * setting.batch)])


def gradient_caching(setting: Setting) -> Training:
    """The same loss and gradient; each text goes through its tower once more, forward only.

    That is what a large batch costs if its activations do not fit. Here they do.
    """
    plain = in_batch_loss(setting.model, **setting.options)

    def loss(batch: Batch) -> Tensor:
        with torch.no_grad():
            setting.model.queries(batch.queries)
            setting.model.items(batch.items)
        return plain(batch)

    return Training([Phase(loss, (2 + 2 * FORWARD_ONLY) * setting.batch)])


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

    return Training([Phase(loss, 2 * setting.batch)])


def full_softmax(setting: Setting) -> Training:
    """Cross-entropy against every item that is trained on, all re-embedded at each step.

    A ceiling: only the batch's embeddings count as cost.
    """
    model, task = setting.model, setting.task
    known = torch.from_numpy(task.trained_items())
    if len(known) > FULL_SOFTMAX_ITEMS:
        raise SystemExit(f"full softmax is for at most {FULL_SOFTMAX_ITEMS} items.")
    place = torch.full((len(task.items),), -1)
    place[known] = torch.arange(len(known))
    bags = bags_of(torch.from_numpy(task.items)[known], len(model.items.vectors))

    def loss(batch: Batch) -> Tensor:
        scores = model.scale() * model.queries(batch.queries) @ model.items.embed(bags).T
        return functional.cross_entropy(scores, place[batch.ids])

    return Training([Phase(loss, 2 * setting.batch)])


IN_BATCH_OPTIONS = ("symmetric", "hard_weight")
OPTIONS = {"in-batch": IN_BATCH_OPTIONS, "gradient-caching": IN_BATCH_OPTIONS}
METHODS: dict[str, Begin] = {
    "in-batch": in_batch,
    "gradient-caching": gradient_caching,
    "memory": memory,
    "cache": cache,
    "full-softmax": full_softmax,
}


def check_options(method: str, options: Iterable[str]) -> None:
    """Exit unless a method takes options with these names; the cache has its own check."""
    known = OPTIONS.get(method, ())
    refused = [] if method == "cache" else sorted(set(options) - set(known))
    if refused:
        raise SystemExit(f"{method} takes the options {[*OF_ALL, *known]}, and not {refused}.")
