"""What a training does with a cache: steps of each kind, and what is done between steps."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import negcache_torch as negcache
import torch
from torch import Tensor
from torch.nn import functional

VOCABULARY, WIDTH, SLOTS, BATCH = 50, 8, 1_024, 32
LOOKED_AT = 64  # the first step at which a handler looks whether the cache does harm
ALL_RANKS = "all ranks"  # in place of a process group that is not there yet
Step = Callable[[Tensor], Tensor]


class Training:
    """Two towers and a cache on a device; `step` is a step, backward pass included.

    given:   further arguments of a step, from the ids
    options: of NegativeCacheLoss
    """

    def __init__(
        self,
        device: torch.device,
        given: Callable[["Training", Tensor], dict[str, Any]] | None = None,
        *,
        dtype: Any = torch.float32,
        **options: Any,
    ) -> None:
        torch.manual_seed(0)
        if options.get("group") == ALL_RANKS:
            options["group"] = torch.distributed.group.WORLD
        self.given, self.device = given, device
        self.queries = torch.nn.Embedding(VOCABULARY, WIDTH).to(device)
        self.items = torch.nn.Embedding(VOCABULARY, WIDTH).to(device)
        integer = negcache.FieldSpec((), torch.int64)
        self.loss_fn = negcache.NegativeCacheLoss(
            SLOTS,
            {"item": integer},
            negcache.FieldSpec((WIDTH,), dtype),
            5.0,
            labels={
                **dict.fromkeys(("id", "kind"), integer),
                "log_q": negcache.FieldSpec((), torch.float32),
            },
            **{"generator": 0, **options},
        ).to(device)

    def network(self, features: dict[str, Tensor]) -> Tensor:
        """Embed items."""
        return functional.normalize(self.items(features["item"]), dim=1)

    def fields(self, ids: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the features and labels of items."""
        return {"item": ids}, {"id": ids, "kind": ids % 3, "log_q": -0.1 * (ids % 7)}

    def arguments(self, ids: Tensor) -> tuple[Any, ...]:
        """Return what every form of a step takes."""
        query = functional.normalize(self.queries(ids), dim=1)
        return self.network, query, self.network({"item": ids}), self.fields(ids)[0]

    def step(self, ids: Tensor) -> Tensor:
        """Take a step."""
        more = {} if self.given is None else self.given(self, ids)
        loss = self.loss_fn(*self.arguments(ids), labels=self.fields(ids)[1], **more)
        loss.backward()
        return loss

    def phases(self, ids: Tensor) -> Tensor:
        """Take a step in its three phases."""
        (network, query, positive, _), (features, labels) = self.arguments(ids), self.fields(ids)
        retrieval = self.loss_fn.retrieve(query, features, labels=labels)
        negative = network(retrieval.features)
        result = self.loss_fn.compute_loss(query, positive, negative, retrieval)
        result.loss.backward()
        self.loss_fn.commit(result, positive, features, labels=labels)
        return result.loss

    def evaluate(self, ids: Tensor) -> Tensor:
        """Return the loss against the cache as it is."""
        labels = self.fields(ids)[1]
        return self.loss_fn(*self.arguments(ids), labels=labels, training=False)

    def autocast(self, ids: Tensor) -> Tensor:
        """Take a step under autocast to bfloat16."""
        with torch.autocast(self.device.type, torch.bfloat16):
            return self.step(ids)


class ManyCaches(Training):
    """The same with two caches, which the loss treats as one."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        specs = {
            "item": negcache.FieldSpec((), torch.int64),
            "embedding": negcache.FieldSpec((WIDTH,), torch.float32),
        }
        self.handler = negcache.MultiCacheLossHandler(
            {name: negcache.CacheManager(specs, SLOTS) for name in "ab"},
            negcache.CacheClassificationLoss(
                "embedding", ("item",), scale=5.0, estimator="shared", generator=0
            ),
            "embedding",
            ("item",),
        ).to(device)

    def step(self, ids: Tensor) -> Tensor:
        """Take a step; one cache gets the batch's items, the other some of them."""
        network, query, positive, features = self.arguments(ids)
        some = {"item": ids[:4]}
        loss = self.handler(
            network,
            query,
            positive,
            {"a": positive, "b": network(some)},
            {"a": features, "b": some},
        )
        loss.backward()
        return loss


def hard_negatives(training: Training, ids: Tensor) -> dict[str, Any]:
    """Return two mined negatives for each query, competing scores, and weights."""
    mined = torch.stack([ids + 1, ids + 2], 1) % VOCABULARY
    fields = training.fields(mined)[1]
    return {
        "hard_negative_embeddings": functional.normalize(training.items(mined), dim=2),
        "hard_negative_features": {key: fields[key] for key in ("id", "kind")},
        "competing_scores": torch.zeros_like(mined, dtype=torch.float32),
        "sample_weight": torch.ones_like(ids, dtype=torch.float32),
    }


BY_ID = {"id_keys": ("id",)}
PUBLISHED = {"estimator": "paper", "in_batch_negatives": False, "max_staleness": None}
EVERYTHING: dict[str, Any] = {
    "given": hard_negatives,
    "id_keys": ("id",),
    "group_key": "kind",
    "margin": 1.0,
    "log_frequency_key": "log_q",
    "staleness_correction": True,
    "num_samples": 2,
    "unique_key": "id",
    "new_items_filter": negcache.IsInCacheFilterFn(("id",)),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "the defaults": {},
    'estimator="exact_query"': {"estimator": "exact_query"},
    'estimator="shared"': {"estimator": "shared"},
    'estimator="paper"': PUBLISHED,
    "num_samples": {"num_samples": 3},
    "top_k": {"estimator": "shared", "top_k": 64},
    "margin": {"margin": 0.5},
    "id_keys": BY_ID,
    "two id_keys": {"id_keys": ("id", "kind")},
    "group_key": {"group_key": "kind"},
    "unique_key": {"unique_key": "id", **BY_ID},
    "log_frequency_key": {"log_frequency_key": "log_q"},
    "no max_staleness": {"max_staleness": None},
    "staleness_correction": {"staleness_correction": True},
    "matryoshka_dims": {"matryoshka_dims": (4, WIDTH)},
    "hard negatives": {"given": hard_negatives, **BY_ID},
    "everything": EVERYTHING,
    "use_lru=False": {"use_lru": False},
    "many tiles": {"tile_bytes": 4_096},
    "bfloat16 rows": {"dtype": torch.bfloat16},
    "float16 rows": {"dtype": torch.float16},
    "int8 rows": {"dtype": "int8"},
    "fused=True": {"fused": True},
    "fused=True, everything, int8 rows": {"fused": True, "dtype": "int8", **EVERYTHING},
}
FORMS = {
    "three phases": lambda device: Training(device, **BY_ID).phases,
    "an evaluation": lambda device: Training(device, **BY_ID).evaluate,
    "autocast": lambda device: Training(device, **BY_ID).autocast,
    "two caches": lambda device: ManyCaches(device).step,
    "GumbelMaxRetrievalFn": lambda device: (
        Training(device, retrieval_fn=negcache.GumbelMaxRetrievalFn(generator=0), **PUBLISHED).step
    ),
    "MaxScoreRetrievalFn": lambda device: (
        Training(device, retrieval_fn=negcache.MaxScoreRetrievalFn(), **PUBLISHED).step
    ),
}
STEPS: dict[str, Callable[[torch.device], Step]] = {
    **{
        name: lambda device, options=options: Training(device, **options).step
        for name, options in OPTIONS.items()
    },
    **FORMS,
}


def batches(count: int, device: torch.device) -> list[Tensor]:
    """Return the ids of some batches."""
    ids = torch.randint(VOCABULARY, (count, BATCH), generator=torch.Generator().manual_seed(0))
    return list(ids.to(device))


TAKEN = 3  # steps, before anything below is done
Doing = Callable[[Training, Path], Callable[[], Any]]


def _step_looked_at(training: Training, _: Path) -> Callable[[], Any]:
    """Take all steps up to the one at which the handler looks at the staleness."""
    *before, last = batches(LOOKED_AT - TAKEN, training.device)
    for ids in before:
        training.step(ids)
    return lambda: training.step(last)


def _without_gradients(training: Training, _: Path) -> Callable[[], Any]:
    (ids,) = batches(1, training.device)
    labels = training.fields(ids)[1]
    return torch.no_grad()(lambda: training.loss_fn(*training.arguments(ids), labels=labels))


def _prefill(training: Training, _: Path) -> Callable[[], Any]:
    features, labels = training.fields(torch.arange(VOCABULARY, device=training.device))
    return lambda: training.loss_fn.prefill(training.network, features, 16, labels=labels)


def _load(training: Training, folder: Path) -> Callable[[], Any]:
    training.loss_fn.save(folder / "cache")
    return lambda: training.loss_fn.load(folder / "cache")


def _load_state_dict(training: Training, _: Path) -> Callable[[], Any]:
    state = training.loss_fn.state_dict()
    return lambda: training.loss_fn.load_state_dict(state)


def _shared(**options: Any) -> Doing:
    """Take a step of a cache that ranks share; there is one rank."""

    def of(training: Training, _: Path) -> Callable[[], Any]:
        shared, (ids,) = Training(training.device, **options), batches(1, training.device)
        shared.step(ids)  # the first one also compares the ranks' options
        return lambda: shared.step(ids)

    return of


BETWEEN_STEPS: dict[str, Doing] = {
    "step 64, 128, 256, …": _step_looked_at,
    "the first call under torch.no_grad()": _without_gradients,
    "prefill()": _prefill,
    "refresh()": lambda one, _: lambda: one.loss_fn.refresh(one.network, 8),
    "evict_nonfinite()": lambda one, _: one.loss_fn.evict_nonfinite,
    "reset()": lambda one, _: one.loss_fn.reset,
    "resize()": lambda one, _: lambda: one.loss_fn.resize(SLOTS // 2),
    "save()": lambda one, folder: lambda: one.loss_fn.save(folder / "saved"),
    "load()": _load,
    "state_dict()": lambda one, _: one.loss_fn.state_dict,
    "load_state_dict()": _load_state_dict,
    "print()": lambda one, _: lambda: repr(one.loss_fn),
    "diagnose()": lambda one, _: one.loss_fn.diagnose,
    "a metric as a number": lambda one, _: lambda: float(one.loss_fn.metrics["staleness"]),
    "a step of a cache in shards": _shared(group=ALL_RANKS),
    "a step with use_cross_replica": _shared(use_cross_replica=True),
}
