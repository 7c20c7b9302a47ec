"""One training of MiniLM: in-batch, with gradient caching or with a cache, within a budget."""

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import negcache_torch as negcache
import numpy as np
import torch
from _minilm_data import Data, Texts, take
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from tournament.method import FORWARD_ONLY
from transformers import AutoModel
from transformers.utils import logging

SCALE, CACHE_SIZE = 20.0, 8_192
CHUNK = 32  # texts embedded at once by gradient caching, unless its options say otherwise
EVALUATED = {"cpu": 64, "cuda": 512}  # texts embedded at once in evaluation
WARM_UP, TIMED = 10, 50  # steps
logging.disable_progress_bar()  # of loading the weights, at each run

Encode = Callable[[Texts], Tensor]  # to (n, D), of length 1
Step = Callable[[Texts, Texts, Tensor], Mapping[str, Any]]  # backward; returns metrics


def encoder(model: torch.nn.Module, precision: str) -> Encode:
    """Return the model's mean over tokens, normalised, in float32."""

    def encode(texts: Texts) -> Tensor:
        mask = texts["attention_mask"]
        device = mask.device.type
        if device == "cpu":  # elsewhere the host would wait for the length
            longest = int(mask.sum(dim=1).max())
            texts = {key: value[:, :longest] for key, value in texts.items()}
            mask = texts["attention_mask"]
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
            # With a mask of two axes, transformers waits to see whether it is all ones.
            found = model(texts["input_ids"], attention_mask=mask[:, None, None].bool())
        weight = mask[:, :, None].float()
        states = found.last_hidden_state.float()
        return normalize((states * weight).sum(dim=1) / weight.sum(dim=1), dim=1)

    return encode


def in_batch_loss(queries: Tensor, items: Tensor, ids: Tensor) -> Tensor:
    """Return the cross-entropy over the batch's items; the same item is not a negative."""
    same = ids[:, None] == ids[None, :]
    same.fill_diagonal_(False)  # noqa: FBT003 - the value to fill in
    scores = (SCALE * queries @ items.T).masked_fill(same, -torch.inf)
    return cross_entropy(scores, torch.arange(len(scores), device=scores.device))


def in_batch(encode: Encode) -> Step:
    """Return a step against the batch's other items."""

    def step(queries: Texts, items: Texts, ids: Tensor) -> Mapping[str, Any]:
        in_batch_loss(encode(queries), encode(items), ids).backward()
        return {}

    return step


def gradient_caching(encode: Encode, chunk: int) -> Step:
    """Return the same step, but with activations for one chunk only: each text is embedded twice.

    First without a graph; then chunk by chunk, given the loss's gradient at the embeddings.
    """
    return in_batch(negcache.in_chunks(encode, chunk))


def cache(encode: Encode, data: Data, seed: int, options: dict[str, Any]) -> Step:
    """Return a step against a cache of items."""
    example = take(data.items, slice(2))
    loss_fn = negcache.NegativeCacheLoss(
        features=example,
        embedding=encode(example).detach(),
        labels={"item": data.item_of[:2]},
        id_keys=("item",),
        **{"scale": SCALE, "cache_size": CACHE_SIZE, "generator": seed, **options},
    ).to(data.item_of.device)

    def step(queries: Texts, items: Texts, ids: Tensor) -> Mapping[str, Any]:
        features = {**items, "item": ids}
        loss_fn(encode, encode(queries), encode(items), features).backward()
        return loss_fn.metrics

    return step


def evaluate(encode: Encode, data: Data) -> dict[str, float]:
    """Return the mean reciprocal rank of the best right item, for both sets of questions."""
    items = embed(encode, data.items)
    report = {}
    for name, (texts, answers) in (("validation", data.validation), ("test", data.test)):
        scores = embed(encode, texts) @ items.T
        best = scores.gather(1, answers).amax(dim=1, keepdim=True)
        # Where a training has diverged, every score is NaN, and the rank the last.
        rank = (~(scores <= best)).sum(dim=1) + 1
        report[f"{name} MRR"] = (1 / rank).mean().item()
    return report


@torch.inference_mode()
def embed(encode: Encode, texts: Texts) -> Tensor:
    """Return the embeddings of many texts, batched by similar length, which saves half the time."""
    order = texts["attention_mask"].sum(dim=1).argsort()
    at_once = EVALUATED[order.device.type]
    found = torch.cat([encode(take(texts, rows)) for rows in order.split(at_once)])
    return found[order.argsort()]


def batches(data: Data, size: int, seed: int) -> Iterator[tuple[Texts, Texts, Tensor]]:
    """Yield batches of queries, items and the items' numbers, from repeated shuffles."""
    rng = np.random.default_rng(seed)
    rows = np.empty(0, int)
    while True:
        while len(rows) < size:
            rows = np.concatenate([rows, rng.permutation(len(data.item_of))])
        batch = torch.from_numpy(rows[:size]).to(data.item_of.device)
        rows = rows[size:]
        ids = data.item_of[batch]
        yield take(data.queries, batch), take(data.items, ids), ids


class ProcessorEvent:
    """The part of `torch.cuda.Event` that a clock needs, in seconds of the processor."""

    def record(self) -> None:
        """Note the time."""
        self.seconds = time.process_time()

    def synchronize(self) -> None:
        """Nothing is late."""

    def elapsed_time(self, later: "ProcessorEvent") -> float:
        """Return the milliseconds until another event."""
        return 1e3 * (later.seconds - self.seconds)


class Clock:
    """Seconds between `start` and `stop`, summed: of the processor, or by a GPU's own events.

    In between, `lap` counts them after each step. A GPU's count is one step late, so that the host
    launches a step while the device does the one before.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.seconds = 0.0
        self.laps: deque[Any] = deque()

    def start(self) -> None:
        """Go on counting."""
        self.before, self.begin = self.seconds, self._event()

    def lap(self) -> None:
        """Count a step."""
        self.laps.append(self._event())
        self._read(late=int(self.on_gpu))

    def stop(self) -> None:
        """Count all steps, and wait for the last."""
        self._read(late=0)

    def _event(self) -> Any:
        event = torch.cuda.Event(enable_timing=True) if self.on_gpu else ProcessorEvent()
        event.record()
        return event

    def _read(self, late: int) -> None:
        while len(self.laps) > late:
            lap = self.laps.popleft()
            lap.synchronize()
            self.seconds = self.before + self.begin.elapsed_time(lap) / 1e3


class Training:
    """A model that a run trains, step by step."""

    def __init__(self, run: dict[str, Any], data: Data, model_folder: Path) -> None:
        torch.manual_seed(run["seed"])
        dropout = {f"{kind}_dropout_prob": run["dropout"] for kind in ("hidden", "attention_probs")}
        model = AutoModel.from_pretrained(str(model_folder), **dropout)
        self.model = model.float().train().to(data.item_of.device)
        self.encode = encoder(self.model, run["precision"])
        options = run["options"]
        self.loss = {
            "in-batch": lambda: in_batch(self.encode),
            "gradient-caching": lambda: gradient_caching(
                self.encode, **{"chunk": CHUNK, **options}
            ),
            "cache": lambda: cache(self.encode, data, run["seed"], options),
        }[run["method"]]()
        self.rate = run["rate"]
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.rate)
        self.stream = batches(data, run["batch"], run["seed"])

    def step(self, used: float) -> dict[str, Any]:
        """Learn from a batch when a share of the budget is used; return metrics."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * max(0.0, 1 - used)
        self.optimizer.zero_grad()
        metrics = dict(self.loss(*next(self.stream)))
        self.optimizer.step()
        return metrics


def measure(
    run: dict[str, Any],
    data: Data,
    model_folder: Path,
    before: dict[str, float],
    tell: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Train once, evaluating at each point; return the run with its curve.

    before: the evaluation of the initial weights; filled in if it is empty
    tell:   called with each point of the curve
    """
    training = Training(run, data, model_folder)
    calls, clock = calls_of_a_pair(run) * run["batch"], Clock(data.item_of.device)
    used, steps, points, kept, curve = 0.0, 0, list(run["points"]), [], []
    clock.start()
    while points:
        if used >= points[0]:
            clock.stop()
            training.model.eval()
            point = {"part": points.pop(0), "seconds": clock.seconds, "steps": steps}
            if not before:
                before |= evaluate(training.encode, data)
            point |= {"pairs": steps * run["batch"], "calls": steps * calls} | _means(kept)
            curve.append(point | (evaluate(training.encode, data) if steps else before))
            tell(curve[-1])
            training.model.train()
            kept = []
            clock.start()
            continue
        kept.append(training.step(used))
        clock.lap()
        steps += 1
        used = steps * calls / run["calls"] if "calls" in run else clock.seconds / run["seconds"]
    return {**run, "curve": curve, "load": os.getloadavg()[0]}


def seconds_of_a_step(run: dict[str, Any], data: Data, model_folder: Path) -> float:
    """Return the mean seconds of a run's steps, without its first."""
    training, clock = Training(run, data, model_folder), Clock(data.item_of.device)
    for step in range(WARM_UP + TIMED):
        if step == WARM_UP:
            clock.start()
        training.step(0)
        if step >= WARM_UP:
            clock.lap()
    clock.stop()
    return clock.seconds / TIMED


def calls_of_a_pair(run: dict[str, Any]) -> float:
    """Return how many texts a step embeds and learns from per pair of its batch."""
    if run["method"] == "cache":
        return 2 + run["options"].get("num_samples", 1)
    return 2 + 2 * FORWARD_ONLY * (run["method"] == "gradient-caching")


def _means(metrics: list[dict[str, Any]]) -> dict[str, float | None]:
    """Return the mean metrics of the rows drawn since the last point; None if there are none."""
    report: dict[str, float | None] = {}
    for key in ("staleness", "window"):
        values = [float(step[key]) for step in metrics if key in step]
        report[key] = float(np.nanmean(values)) if values else None
    return report


def name_of(device: str) -> str:
    """Return the device's name, by which results are kept apart."""
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"
