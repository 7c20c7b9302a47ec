"""Nothing is made on another device than the tensors that come in.

The "meta" device stands in for a GPU: PyTorch refuses to mix it with the CPU as it does CUDA, and
computes shapes without values.
"""

import negcache_torch as negcache
import pytest
import torch
from negcache_torch import _namespace
from negcache_torch._backend import TORCH
from torch._subclasses.fake_tensor import FakeTensorMode

from negcache_core import exact
from negcache_core.losses.estimators import Weights

META = torch.device("meta")
OPTIONS = [
    {"estimator": estimator, "in_batch_negatives": in_batch, **more}
    for estimator in ("paper", "shared", "exact_query")
    for in_batch in (False, True)
    for more in ({}, {"top_k": 3})
    if not (estimator == "exact_query" and more)
]


def rows(*shape):
    return torch.ones(shape, device=META)


@pytest.fixture
def blind(monkeypatch):
    """Decide nothing by a value: there are none."""
    monkeypatch.setattr(type(TORCH), "truth", lambda self, value: None)


@pytest.mark.usefixtures("blind")
@pytest.mark.parametrize("options", OPTIONS, ids=lambda each: " ".join(map(str, each.values())))
def test_a_handler_stays_on_its_device(options):
    specs = {
        "x": negcache.FieldSpec((5,), torch.float32),
        "id": negcache.FieldSpec((), torch.int64),
        "log_q": negcache.FieldSpec((), torch.float32),
        "embedding": negcache.FieldSpec((4,), torch.bfloat16),
    }
    more = {
        "id_key": "id",
        "group_key": "id",
        "margin": 1.0,
        "log_frequency_key": "log_q",
        "staleness_correction": True,
    }
    handler = negcache.CacheLossHandler(
        negcache.CacheManager(specs, 200, unique_key="id"),
        negcache.CacheClassificationLoss("embedding", ("x",), num_samples=2, **more, **options),
        "embedding",
        ("x",),
        new_items_filter=negcache.IsInCacheFilterFn(("id",)),
    ).to(META)
    tower = torch.nn.Linear(5, 4, device=META)

    def network(features):
        return tower(features["x"])

    features = {"x": rows(3, 5), "id": rows(3).long(), "log_q": rows(3)}
    loss = handler.update_cache_and_compute_loss(
        network,
        tower(features["x"]),
        tower(features["x"]),
        features,
        hard_negative_embeddings=rows(3, 2, 4),
        hard_negative_features={"id": rows(3, 2).long()},
        competing_scores=rows(3, 6),
        constant=("hard_negatives",),
        sample_weight=rows(3),
    )
    loss.backward()
    handler.refresh(network, 4)
    handler.prefill(network, features, 2)
    handler.evict_nonfinite()
    found = [loss, tower.weight.grad, *handler.metrics.values(), *handler.state_dict().values()]
    assert {each.device for each in found} == {META}


@pytest.mark.parametrize("options", [{}, {"margin": 0.5}, {"top_k": 64, "estimator": "shared"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_on_the_host_stays_there_whatever_the_default_device(options, dtype, tmp_path):
    """As after torch.set_default_device("cuda"), with what a step does for large caches alone."""
    spec = negcache.FieldSpec((), torch.int64)
    loss_fn = negcache.NegativeCacheLoss(
        1_024,
        {"x": spec},
        embedding=torch.empty(1, 4, dtype=dtype),
        labels={"id": spec, "kind": spec},
        id_keys=("id",),
        group_key="kind",
        generator=0,
        **options,
    )
    tower, ids = torch.nn.Embedding(50, 4), torch.arange(32)
    features, labels = {"x": ids}, {"id": ids, "kind": ids % 3}

    def network(rows):
        return tower(rows["x"])

    with META:
        for _ in range(2):
            loss_fn(network, tower(ids), tower(ids), features, labels=labels).backward()
        loss_fn.prefill(network, features, 8, labels=labels)
        loss_fn.refresh(network, 8)
        loss_fn.evict_nonfinite()
        loss_fn.save(tmp_path / "cache")
        loss_fn.load(tmp_path / "cache")
        loss_fn.load_state_dict(loss_fn.state_dict())
        loss_fn.eval()
        found = loss_fn(network, tower(ids), tower(ids), features, labels=labels)
    assert {each.device.type for each in (found, *loss_fn.state_dict().values())} == {"cpu"}


def test_functions_stay_on_their_device():
    scores = rows(2, 7)
    found = [
        *negcache.approximate_top_k_with_indices(scores, 3),
        negcache.MaxScoreRetrievalFn()(scores),
        negcache.GumbelMaxRetrievalFn()(scores, noise=scores),
        *exact.softmax_cross_entropy(rows(2, 4), rows(2, 4), rows(7, 4)).gradients,
        *exact.surrogate_gradients(
            Weights(own=rows(2, 1)),
            rows(2),
            rows(2, 1).long(),
            rows(2, 4),
            rows(2, 4),
            rows(7, 4),
        ),
    ]
    assert {each.device for each in found} == {META}


@pytest.mark.parametrize("size", [0, 1, 5, 128, 301])
def test_sums_by_doubling_are_cumulative_sums(size):
    numbers = torch.randint(99, (3, size), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(_namespace.sums_by_doubling(numbers, -1), numbers.cumsum(-1))
    assert torch.equal(_namespace.sums_by_doubling(numbers.T, 0), numbers.T.cumsum(0))


def test_cuda_sums_without_cumsum_where_that_raises(monkeypatch):
    """PyTorch has no deterministic torch.cumsum of floats on CUDA."""

    def refuse(*_):
        raise RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation")

    monkeypatch.setattr(torch, "cumsum", refuse)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    with FakeTensorMode():
        sums = _namespace.cumulative_sum(torch.ones((3, 300), device="cuda"), axis=-1)
    assert sums.shape == (3, 300)
    with pytest.raises(RuntimeError, match="cumsum"):
        _namespace.cumulative_sum(torch.ones(3), axis=0)  # the CPU has one
