"""Scores of further candidates compete in a query's softmax, exactly and with gradients."""

import numpy as np
import pytest
import torch
from backends import BACKENDS, EAGER
from laws import TOLERANCE, law_of_scores, noise_for

from negcache_core import exact
from negcache_core.cache.state import EMPTY, NegativeCache
from negcache_core.errors import DeviceError, DTypeError, KindError, OptionError, ShapeError
from negcache_core.losses.estimators import ESTIMATORS

B, C, N, D = 2, 3, 3, 2
NONE = np.asarray([[False, True, False], [False, False, True]])  # of the scores (B, N)
FACTORS = np.asarray([0.5, 2.0])


def backend_name(backend):
    return backend.name


def problem(seed=0):
    """Return a cache, and what is differentiated: queries, positives, items, others, scale."""
    rng = np.random.default_rng(seed)
    items = rng.standard_normal((C, D))
    stale = items + 0.1 * rng.standard_normal((C, D))
    age = np.asarray([0, 4, 1], np.int32)
    cache = NegativeCache({"x": np.eye(C), "embedding": stale}, age)
    arrays = [rng.standard_normal(shape) for shape in ((B, D), (B, D), (B, N, D))]
    return cache, [*arrays[:2], items, arrays[2], np.asarray(1.3)]


class Step:
    """A loss on one cache, as a function of what is differentiated."""

    def __init__(self, backend, cache, *, kind="scores", **options):
        self.xp = backend.module.CacheManager.backend.xp
        self.backend, self.kind, self.now = backend, kind, {}
        self.cache = backend.native(cache)
        self.none = backend.to_native(NONE)
        self.loss = backend.module.CacheClassificationLoss(
            "embedding", ("x",), scale=lambda: self.now["scale"], reducer=None, **options
        )

    def competing(self, query, others, scale):
        scores = scale * self.xp.sum(query[:, None, :] * others, axis=2)
        return self.xp.where(self.none, -float("inf"), scores)

    def __call__(self, query, positive, items, others, scale, noise):
        """Return the result by query; `kind` says how the other candidates are given."""
        self.now["scale"], more = scale, {}
        if self.kind == "scores":
            more["competing_scores"] = self.competing(query, others, scale)
        elif self.kind == "embeddings":
            hard = self.xp.where(self.none[:, :, None], float("nan"), others)  # does not count
            more["hard_negative_embeddings"] = hard
        return self.loss(
            lambda features: self.xp.matmul(features["x"], items),
            query,
            positive,
            self.cache,
            pos_features={"x": self.backend.to_native(np.eye(C)[:B])},
            noise=noise,
            **more,
        )


def reference(cache, arrays, *, in_batch):
    """Return the exact gradients of the weighted sum, its value by query, and the cache's law."""
    query, positive, items, others, scale = (
        torch.tensor(array, requires_grad=True) for array in arrays
    )
    stale = scale * query @ torch.as_tensor(cache.data["embedding"]).T
    stale = stale.masked_fill(torch.as_tensor(cache.age == EMPTY), -torch.inf).detach()
    own = scale * (query * positive).sum(1, keepdim=True)
    more = scale * torch.einsum("bd,bnd->bn", query, others)
    scores = [own, scale * query @ items.T, more]
    logits = [own, stale, more.masked_fill(torch.as_tensor(NONE), -torch.inf)]
    if in_batch:
        scores.append(scale * query @ positive.T)
        logits.append(scores[-1].masked_fill(torch.eye(B, dtype=torch.bool), -torch.inf))
    scores, logits = torch.cat(scores, 1), torch.cat(logits, 1).detach()
    slopes = torch.softmax(logits, 1)
    slopes[:, 0] -= 1
    total = ((slopes * scores).sum(1) * torch.as_tensor(FACTORS)).sum()
    value = torch.logsumexp(logits, 1) - logits[:, 0]
    gradients = torch.autograd.grad(total, [query, positive, items, others, scale])
    return gradients, value, law_of_scores(stale.numpy())


@pytest.mark.parametrize("in_batch", [False, True], ids=["cache alone", "in-batch"])
@pytest.mark.parametrize("estimator", sorted(ESTIMATORS))
@pytest.mark.parametrize("name", ["torch", "tensorflow", "tf.function+xla", "jax.jit"])
def test_the_expected_gradient_and_the_value_are_those_of_the_whole_softmax(
    name, estimator, in_batch
):
    backend, (cache, arrays) = BACKENDS[name], problem()
    step = Step(backend, cache, estimator=estimator, in_batch_negatives=in_batch)
    expected, value_expected, law = reference(cache, arrays, in_batch=in_batch)
    factors = backend.to_native(FACTORS)

    def value(*given):
        return step.xp.sum(step(*given).loss * factors)

    total = [0.0] * len(arrays)
    native = [backend.to_native(array) for array in arrays]
    for slots, probability in exact.enumerate_draws(law):
        noise = backend.to_native(noise_for(slots, law))
        for place, gradient in enumerate(backend.gradients(value, native, noise)):
            total[place] = total[place] + probability * np.asarray(gradient)
    names = ("query", "positive", "items", "others", "scale")
    for which, ours, theirs in zip(names, total, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, err_msg=which, **TOLERANCE)
    found = backend.to_numpy(step(*native, noise).interpretable_loss)
    np.testing.assert_allclose(found, value_expected, **TOLERANCE)


@pytest.mark.parametrize(
    ("backend", "estimator", "tile_bytes"),
    [
        pytest.param(backend, estimator, tile_bytes, id=f"{name}-{estimator}-{tile_bytes}")
        for name, backend in BACKENDS.items()
        for estimator in sorted(ESTIMATORS)
        for tile_bytes in (None, 1)  # all queries at once, or one after the other
        # What compiles takes long: there the most of it, and `paper`, whose draws are not shared.
        if name in EAGER or (estimator, tile_bytes) in (("exact_query", 1), ("paper", None))
    ],
)
def test_they_are_what_hard_negatives_of_these_embeddings_are(backend, estimator, tile_bytes):
    cache, arrays = problem(1)
    found = []
    noise = np.random.default_rng(2).random((B, 1, 2))
    for kind in ("scores", "embeddings", "neither"):
        step = Step(
            backend,
            cache,
            kind=kind,
            estimator=estimator,
            in_batch_negatives=True,
            tile_bytes=tile_bytes,
            generator=None if backend.name.startswith("jax") else 0,
        )

        def values(arrays, noise, step=step):
            got = step(*arrays, noise)
            metrics = {k: v for k, v in got.metrics.items() if k != "nonfinite_count"}
            return got.training_loss, got.interpretable_loss, got.staleness, metrics

        def value(*given, step=step):
            return step.xp.sum(step(*given).loss)

        found.append([backend.replay(values, tuple(arrays), noise)])
        if backend.gradients is not None:
            native = [backend.to_native(array) for array in arrays]
            rest = native if kind != "neither" else [*native[:3], native[4]]

            def of_rest(*given, value=value, kind=kind, native=native):
                if kind == "neither":
                    given = (*given[:3], native[3], *given[3:])
                return value(*given)

            gradients = backend.gradients(of_rest, rest, backend.to_native(noise))
            found[-1].append(tuple(map(np.asarray, gradients)))
    ours, theirs, without = found
    assert_alike(ours, theirs)
    assert (ours[0][1] > without[0][1] + 0.01).all()  # they do compete


def assert_alike(ours, theirs):
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        ours, theirs = list(ours.values()), list(theirs.values())
    if isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs)
        for mine, other in zip(ours, theirs, strict=True):
            assert_alike(mine, other)
    else:
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", [*EAGER.values(), BACKENDS["jax"]], ids=backend_name)
def test_rows_without_any_candidate_and_no_columns_are_as_if_there_were_none(backend):
    cache, arrays = problem()
    query, positive, items, _, scale = (backend.to_native(array) for array in arrays)
    noise = backend.to_native(np.random.default_rng(0).random((B, 1, 2)))
    step = Step(backend, cache, kind="neither", estimator="shared")
    plain = step(query, positive, items, None, scale, noise)
    for empty in (np.full((B, 2), -np.inf), np.zeros((B, 0))):
        result = step.loss(
            lambda features: step.xp.matmul(features["x"], items),
            query,
            positive,
            step.cache,
            noise=noise,
            competing_scores=backend.to_native(empty),
        )
        for ours, theirs in zip(result[:2], plain[:2], strict=True):
            np.testing.assert_allclose(
                backend.to_numpy(ours), backend.to_numpy(theirs), rtol=1e-12, atol=1e-13
            )


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["torch", "tensorflow", "tf.function+xla", "jax.jit"])
def test_a_score_that_is_not_finite_takes_its_own_query_out_and_no_other(name, poison):
    backend, (cache, arrays) = BACKENDS[name], problem()
    step = Step(backend, cache, kind="scores", in_batch_negatives=True)
    noise = backend.to_native(np.random.default_rng(0).random((B, 1, 2)))
    native, first = [backend.to_native(each) for each in arrays], np.arange(B) == 0
    mask = backend.to_native(first[:, None] & (np.arange(N) == 2))
    well = step.competing

    def poisoned(*given):
        return step.xp.where(mask, poison, well(*given))

    def value(*given):
        return step.xp.sum(step(*given).loss * backend.to_native(1.0 - first))

    def of_the_well(*given):
        losses = step(*given).loss
        return step.xp.sum(step.xp.where(backend.to_native(first), 0.0, losses))

    expected = backend.gradients(value, native, noise)
    step.competing = poisoned
    losses = backend.to_numpy(step(*native, noise).loss)
    assert np.isnan(losses).tolist() == [True, False]
    for ours, theirs in zip(backend.gradients(of_the_well, native, noise), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, **TOLERANCE)


@pytest.mark.parametrize(
    ("scores", "error", "message"),
    [
        (np.zeros((B + 1, 2)), ShapeError, r"scores has shape \(3, 2\): expected \(2, n\)"),
        (np.zeros(B), ShapeError, r"scores has shape \(2,\): expected \(2, n\). One row"),
        (np.zeros((B, 2), np.int32), DTypeError, "scores has dtype int32: expected floating"),
        ([[0.0], [0.0, 1.0]], KindError, "competing_scores is a list, which"),
    ],
)
@pytest.mark.parametrize("backend", EAGER.values(), ids=backend_name)
def test_bad_scores_are_refused_in_words(backend, scores, error, message):
    cache, arrays = problem()
    step = Step(backend, cache, kind="scores")
    known = isinstance(scores, np.ndarray)
    step.competing = lambda *_: backend.to_native(scores) if known else scores
    native = [backend.to_native(each) for each in arrays]
    noise = backend.to_native(np.zeros((B, 1, 2)))
    with pytest.raises(error, match=message):
        step(*native, noise)


@pytest.mark.parametrize("backend", EAGER.values(), ids=backend_name)
def test_a_loss_of_several_widths_refuses_scores_in_words(backend):
    cache, arrays = problem()
    step = Step(backend, cache, estimator="shared", matryoshka_dims=(1, D))
    native = [backend.to_native(each) for each in arrays]
    with pytest.raises(OptionError, match="a softmax for each width, but a score belongs to one"):
        step(*native, backend.to_native(np.zeros((B, 1, 2))))


def test_scores_elsewhere_than_the_cache_are_refused_in_words():
    cache, arrays = problem()
    step = Step(BACKENDS["torch"], cache, kind="scores")
    step.competing = lambda *_: torch.zeros(B, 2, device="meta")
    with pytest.raises(DeviceError, match="competing_scores is on meta and the cache on cpu"):
        step(*map(torch.as_tensor, arrays), torch.zeros(B, 1, 2))


@pytest.mark.parametrize("backend", EAGER.values(), ids=backend_name)
def test_a_handler_takes_them_in_a_step_and_in_evaluation(backend):
    module, rng = backend.module, np.random.default_rng(0)
    specs = {"x": module.FieldSpec((D,), "float64"), "embedding": module.FieldSpec((D,), "float64")}
    handler = module.CacheLossHandler(
        module.CacheManager(specs, 8), module.CacheClassificationLoss("embedding", ("x",))
    )
    query, item = (backend.to_native(rng.standard_normal((B, D))) for _ in range(2))
    scores = rng.standard_normal((B, N))
    own = (backend.to_numpy(query) * backend.to_numpy(item)).sum(axis=1)
    expected = np.mean(np.log(np.exp(own) + np.exp(scores).sum(axis=1)) - own)
    given = (lambda features: features["x"], query, item, {"x": item})
    more = {"competing_scores": backend.to_native(scores)}
    evaluated = handler.evaluate(*given, **more).loss
    found = [evaluated, handler.update_cache_and_compute_loss(*given, **more)]
    for loss in found:  # the cache is empty in both
        np.testing.assert_allclose(backend.to_numpy(loss), expected, rtol=1e-12)
