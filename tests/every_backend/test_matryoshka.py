"""Matryoshka dims: enumerated over all draws, the gradient is that of every width's full loss."""

import itertools

import numpy as np
import pytest
import torch
from backends import BACKENDS, EAGER

from negcache_core.cache.state import EMPTY, NegativeCache

B, C, D, H = 2, 4, 5, 2
AGE = np.asarray([1, EMPTY, 0, 3], np.int32)
CUT = 2  # where two caches meet
IDS = {"cache": np.asarray([7, 8, 9, 5]), "batch": np.asarray([9, 4])}
HARD_IDS = np.asarray([[9, 1], [2, 3]])
EVERYTHING = {"in_batch_negatives": True, "id_keys": ("id",), "hard": True}
OPTIONS = {
    "bare": {},
    "everything": EVERYTHING,
    "in-batch negatives": {"in_batch_negatives": True},
    "margin": {**EVERYTHING, "margin": -0.2, "weights": None},
    "margin over all": {"margin": -9.0},
    "frequencies": {"log_frequency_key": "frequency", "in_batch_negatives": True},
    "group": {"group_key": "group", "hard": True},
    "one query at a time": {**EVERYTHING, "tile_bytes": 1, "margin": 0.1},
    "two caches": {**EVERYTHING, "split": True},
    "sample weight": {"sample_weight": np.asarray([0.3, 2.0])},
    "unlike dims": {"dims": (4, 1), "weights": (0.2, 3.0)},
    "one dim": {"dims": (3,), "weights": (2.0,)},
    "all dims": {"dims": (5, 2), "weights": None, "in_batch_negatives": True},
}
GRADIENTS = {name: each for name, each in BACKENDS.items() if each.gradients is not None}
EXACT = {"rtol": 1e-10, "atol": 1e-10}


class Problem:
    """A batch, a cache, and what a loss is told of them."""

    def __init__(self, options, seed=3, *, stale=True):
        self.options = dict(options)
        self.dims = self.options.pop("dims", (2, 4))
        self.weights = self.options.pop("weights", (0.7, 1.5))
        self.hard_wanted = self.options.pop("hard", False)
        self.split = self.options.pop("split", False)
        self.sample_weight = self.options.pop("sample_weight", None)
        rng = np.random.default_rng(seed)
        self.query, self.positive = rng.standard_normal((2, B, D))
        self.fresh = rng.standard_normal((C, D))
        self.table = self.fresh + 0.4 * stale * rng.standard_normal((C, D))
        self.table[AGE == EMPTY] = np.nan  # as memory may hold anything there
        self.hard = rng.standard_normal((B, H, D))
        self.frequency = rng.normal(size=C), rng.normal(size=B)
        self.scale = np.asarray(1.7)

    def per_width(self):
        weights = self.weights or [1.0] * len(self.dims)
        return sorted(zip(self.dims, weights, strict=True))

    def cut(self, width):
        """Return queries, positives, stale, fresh and hard items at one width."""

        def unit(rows):
            rows = torch.as_tensor(rows)[..., :width]
            return rows / rows.norm(dim=-1, keepdim=True)

        return [
            unit(each)
            for each in (
                self.query,
                self.positive,
                np.nan_to_num(self.table),
                self.fresh,
                self.hard,
            )
        ]

    def opposes(self, kind, ids, scores, own, groups=None):
        """Return which of scores (B, n) are negatives', by ids (n,) or (B, n), and margin."""
        counts = torch.ones_like(scores, dtype=torch.bool)
        if self.options.get("id_keys"):
            counts &= torch.as_tensor(ids != IDS["batch"][:, None])
        if self.options.get("group_key"):
            counts &= torch.as_tensor(groups == IDS["batch"][:, None] % 2)
        if self.options.get("margin") is not None:
            counts &= scores <= own[:, None] + self.options["margin"]
        return counts

    def stale_logits(self, width):
        query, positive, stale, *_ = self.cut(width)
        scores = float(self.scale) * query @ stale.T
        own = float(self.scale) * (query * positive).sum(1)
        ids = IDS["cache"]
        counts = self.opposes("cache", ids, scores, own, ids % 2) & torch.as_tensor(AGE != EMPTY)
        if self.options.get("log_frequency_key"):
            scores = scores - torch.as_tensor(self.frequency[0])
        return scores.masked_fill(~counts, -torch.inf)

    def full(self, query, positive, fresh, scale, hard):
        """Return the weighted sum of full losses (B,): values stale, gradients of fresh scores."""
        total = 0.0

        def unit(rows, width):
            rows = rows[..., :width]
            return rows / rows.norm(dim=-1, keepdim=True)

        for width, weight in self.per_width():
            q, p, f, h = (unit(each, width) for each in (query, positive, fresh, hard))
            logits = self.stale_logits(width)
            now = scale * q @ f.T
            now = now - now.detach()
            parts = [torch.where(torch.isfinite(logits), logits + now, -torch.inf)]
            own = scale * (q * p).sum(1)
            if self.options.get("in_batch_negatives"):
                scores, ids = scale * q @ p.T, IDS["batch"]
                counts = self.opposes("batch", ids, scores.detach(), own.detach(), ids % 2)
                counts &= ~torch.eye(B, dtype=torch.bool)
                if self.options.get("log_frequency_key"):
                    scores = scores - torch.as_tensor(self.frequency[1])
                parts.append(scores.masked_fill(~counts, -torch.inf))
            if self.hard_wanted:
                scores = scale * torch.einsum("bd,bhd->bh", q, h)
                counts = self.opposes("hard", HARD_IDS, scores.detach(), own.detach(), HARD_IDS % 2)
                parts.append(scores.masked_fill(~counts, -torch.inf))
            everything = torch.cat([own[:, None], *parts], dim=1)
            total = total + weight * (torch.logsumexp(everything, dim=1) - own)
        return total if self.sample_weight is None else total * torch.as_tensor(self.sample_weight)

    def exact(self):
        """Return the full losses (B,), and the gradients of their mean."""
        arrays = [
            torch.tensor(each, requires_grad=True)
            for each in (self.query, self.positive, self.fresh, self.scale, self.hard)
        ]
        losses = self.full(*arrays)
        found = torch.autograd.grad(losses.mean(), arrays, allow_unused=True)
        zero = np.zeros_like(self.hard)
        return losses.detach().numpy(), [zero if each is None else each.numpy() for each in found]

    def outcomes(self):
        """Yield every outcome of the draw: noise (B, 1, 2), and its probability.

        Each query draws a block and a width, and then a slot: blocks are caches here.
        """
        blocks = [slice(CUT), slice(CUT, None)] if self.split else [slice(None)]
        weights = np.asarray([weight for _, weight in self.per_width()])
        by_query = []
        logits = np.stack([self.stale_logits(width).numpy() for width, _ in self.per_width()])
        for query in range(B):
            joint = np.exp(logits[:, query, :])  # (W, C)
            usable = joint.sum(axis=1) > 0
            if not usable.any():
                by_query.append([(0.5, 0.5, 1.0)])
                continue
            joint /= np.where(usable, joint.sum(axis=1), 1.0)[:, None]
            joint *= (weights / weights[usable].sum())[:, None]
            cells = [(w, block) for block in blocks for w in range(len(weights))]
            ends = np.cumsum([joint[w, block].sum() for w, block in cells])
            mine = []
            for (w, block), end in zip(cells, ends, strict=True):
                inside = joint[w, block]
                first = end - inside.sum() / 2
                for slot, stop in enumerate(np.cumsum(inside)):
                    if inside[slot] > 0:
                        second = (stop - inside[slot] / 2) / inside.sum()
                        mine.append((first, second, inside[slot]))
            by_query.append(mine)
        for outcome in itertools.product(*by_query):
            noise = np.asarray([[each[:2]] for each in outcome])
            yield noise, float(np.prod([each[2] for each in outcome]))

    def losses(self, backend, estimator, **more):
        """Return a function of arrays and noise: the result by query, of one backend."""
        module, xp = backend.module, backend.module.CacheManager.backend.xp
        now = {}
        loss = module.CacheClassificationLoss(
            "embedding",
            ("chosen",),
            estimator=estimator,
            scale=lambda: now["scale"],
            matryoshka_dims=self.dims,
            matryoshka_weights=self.weights,
            reducer=None,
            **self.options,
            **more,
        )
        rows = {
            "chosen": np.eye(C, dtype=self.fresh.dtype),
            "id": IDS["cache"],
            "group": IDS["cache"] % 2,
            "frequency": self.frequency[0],
            "embedding": self.table,
        }
        parts = {"a": slice(CUT), "b": slice(CUT, None)} if self.split else {"a": slice(None)}
        cache = {
            name: backend.native(NegativeCache({k: v[part] for k, v in rows.items()}, AGE[part]))
            for name, part in parts.items()
        }
        cache = cache if self.split else cache["a"]
        given = {
            "pos_features": {
                "chosen": np.zeros((B, C), self.fresh.dtype),
                "id": IDS["batch"],
                "group": IDS["batch"] % 2,
                "frequency": self.frequency[1],
            }
        }
        if self.hard_wanted:
            given["hard_negative_features"] = {"id": HARD_IDS, "group": HARD_IDS % 2}
        if self.sample_weight is not None:
            given["sample_weight"] = self.sample_weight
        given = backend.native(given)

        def result(query, positive, fresh, scale, hard, noise):
            now["scale"] = scale
            wanted = {"hard_negative_embeddings": hard} if self.hard_wanted else {}
            return loss(
                lambda features: xp.matmul(features["chosen"], fresh),
                query,
                positive,
                cache,
                noise=noise,
                **given,
                **wanted,
            )

        return result

    def arrays(self, backend):
        known = (self.query, self.positive, self.fresh, self.scale, self.hard)
        return [backend.to_native(each) for each in known]


def assert_unbiased(backend, problem, estimator, **more):
    xp = backend.module.CacheManager.backend.xp
    result = problem.losses(backend, estimator, **more)
    losses, expected = problem.exact()

    def value(*arrays):
        return xp.mean(result(*arrays).loss) + 0.0 * xp.sum(arrays[4])

    total, probability_of_all = None, 0.0
    arrays = problem.arrays(backend)
    for drawn, probability in problem.outcomes():
        noise = backend.to_native(drawn)
        found = backend.gradients(value, arrays, noise)
        terms = [probability * np.asarray(each) for each in found]
        total = terms if total is None else [a + b for a, b in zip(total, terms, strict=True)]
        probability_of_all += probability
    assert probability_of_all == pytest.approx(1.0, abs=1e-12)
    for what, ours, exact in zip(("q", "p", "f", "s", "h"), total, expected, strict=True):
        np.testing.assert_allclose(ours, exact, err_msg=what, **EXACT)
    given = backend.numpy(result(*arrays, noise).interpretable_loss)
    np.testing.assert_allclose(given, losses, **EXACT)


@pytest.mark.parametrize("stale", [False, True], ids=["fresh", "stale"])
@pytest.mark.parametrize("estimator", ["shared", "exact_query"])
@pytest.mark.parametrize("options", OPTIONS)
def test_the_expected_gradient_is_that_of_the_full_losses_of_all_widths(options, estimator, stale):
    assert_unbiased(BACKENDS["torch"], Problem(OPTIONS[options], stale=stale), estimator)


@pytest.mark.parametrize("name", [name for name in GRADIENTS if name != "torch"])
@pytest.mark.parametrize("estimator", ["shared", "exact_query"])
def test_so_it_is_in_every_library(name, estimator):
    options = {**EVERYTHING, "margin": 1.0, "dims": (3, 1)}
    assert_unbiased(BACKENDS[name], Problem(options), estimator)


def test_so_it_is_with_several_draws_of_a_query():
    problem = Problem({"dims": (2, 4)})
    one = list(problem.outcomes())

    def twice():
        for (first, p), (second, q) in itertools.product(one, one):
            yield np.concatenate([first, second], axis=1), p * q

    problem.outcomes = twice
    assert_unbiased(BACKENDS["torch"], problem, "shared", num_samples=2)


def test_on_a_fresh_cache_the_staleness_correction_changes_nothing():
    problem = Problem(EVERYTHING, stale=False)
    assert_unbiased(BACKENDS["torch"], problem, "exact_query", staleness_correction=True)


@pytest.mark.parametrize("name", [*EAGER, "jax"])
@pytest.mark.parametrize("estimator", ["shared", "exact_query"])
def test_one_dim_that_is_the_whole_width_is_the_plain_loss_of_unit_embeddings(name, estimator):
    backend = BACKENDS[name]
    found = []
    for dims in ((D,), None):
        problem = Problem({"in_batch_negatives": True, "dims": dims, "weights": None})
        for key in ("query", "positive", "fresh", "table"):
            rows = getattr(problem, key)
            setattr(problem, key, rows / np.linalg.norm(rows, axis=1, keepdims=True))
        result = problem.losses(backend, estimator)
        noise = backend.to_native(np.random.default_rng(0).random((B, 1, 2)))
        out = backend.numpy(result(*problem.arrays(backend), noise))
        found.append(out)
    ours, plain = found
    for what in ("interpretable_loss", "staleness", "updated_item_indices"):
        np.testing.assert_allclose(getattr(ours, what), getattr(plain, what), **EXACT)
    assert ours.metrics.keys() == plain.metrics.keys()
    for key, value in plain.metrics.items():
        np.testing.assert_allclose(ours.metrics[key], value, err_msg=key, **EXACT)


@pytest.mark.parametrize("width", [2, 4])
def test_what_has_no_length_at_a_width_scores_nothing_there_and_has_a_gradient_all_the_same(width):
    problem = Problem(EVERYTHING)
    for rows in (problem.query, problem.positive, problem.fresh, problem.table, problem.hard):
        rows[..., :width] = 0.0
    for name, backend in GRADIENTS.items():
        if name in {"tf.function+xla", "jax"}:
            continue  # as the others
        result, xp = problem.losses(backend, "exact_query"), backend.module.CacheManager.backend.xp
        noise = backend.to_native(np.full((B, 1, 2), 0.9))
        arrays = problem.arrays(backend)

        def value(*given, result=result, xp=xp):
            return xp.sum(result(*given).loss)

        for gradient in backend.gradients(value, arrays, noise):
            assert np.isfinite(gradient).all()
        loss = np.asarray(backend.to_numpy(result(*arrays, noise).interpretable_loss))
        assert np.isfinite(loss).all()
    problem.dims, problem.weights = (width,), None
    loss = problem.losses(BACKENDS["numpy"], "shared")(*problem.arrays(BACKENDS["numpy"]), noise_())
    counts = [1 + (IDS["cache"][AGE != EMPTY] != own).sum() + 1 for own in IDS["batch"]]
    counts = [n + (HARD_IDS[row] != IDS["batch"][row]).sum() for row, n in enumerate(counts)]
    np.testing.assert_allclose(loss.interpretable_loss, np.log(counts), **EXACT)


def noise_(rows=B, draws=1):
    return np.random.default_rng(5).random((rows, draws, 2))


@pytest.mark.parametrize("estimator", ["shared", "exact_query"])
@pytest.mark.parametrize("tile_bytes", [1, None])
@pytest.mark.parametrize("dims", [(2, D), (2, 4)])
def test_a_poisoned_query_reaches_no_other(estimator, tile_bytes, dims):
    """Also where only its last coordinate is not finite, so that narrow widths could be scored."""
    backend, found = BACKENDS["torch"], []
    for poison in (False, True):
        problem = Problem({"dims": dims, "in_batch_negatives": True})
        result = problem.losses(backend, estimator, tile_bytes=tile_bytes)
        if poison:
            problem.query[1, -1] = np.nan
        arrays = [each.clone().requires_grad_() for each in problem.arrays(backend)]
        noise = backend.to_native(noise_())
        out = result(*arrays, noise)
        out.loss[0].backward()
        assert torch.isnan(out.loss[1]) == poison
        found.append((out, arrays))
        if poison:
            assert out.metrics["masked_count"] == (dims[-1] == D)  # else it can draw
            assert all(torch.isfinite(each.grad).all() for each in arrays[:4])
    assert float(found[0][0].interpretable_loss[0].detach()) == pytest.approx(
        float(found[1][0].interpretable_loss[0].detach()), rel=1e-12
    )


@pytest.mark.parametrize("name", ["numpy", "torch", "tensorflow", "jax"])
def test_half_storage_is_scored_at_every_width_as_what_it_was_rounded_to(name):
    backend, found = BACKENDS[name], []
    rounded = Problem({}, stale=True).table.astype(np.float16)
    for table in (rounded, rounded.astype(np.float32)):
        problem = Problem(EVERYTHING)
        problem.table = table
        for key in ("query", "positive", "fresh", "hard", "scale"):
            setattr(problem, key, getattr(problem, key).astype(np.float32))
        result = problem.losses(backend, "exact_query")
        noise = backend.to_native(noise_())
        out = result(*problem.arrays(backend), noise)
        found.append(np.asarray(backend.to_numpy(out.interpretable_loss)))
        assert found[-1].dtype == np.float32
    np.testing.assert_allclose(*found, rtol=1e-6)


@pytest.mark.parametrize("name", ["numpy", "torch", "tensorflow", "jax"])
@pytest.mark.parametrize(("rows", "hard"), [(0, 1), (2, 0)])
def test_no_queries_and_no_hard_negatives_are_fine_at_several_widths(name, rows, hard):
    backend = BACKENDS[name]

    def native(*shape):
        return backend.to_native(np.ones(shape, np.float32))

    loss = backend.module.CacheClassificationLoss(
        "e", ("x",), estimator="exact_query", in_batch_negatives=True, matryoshka_dims=(2, 4)
    )
    cache = NegativeCache(
        {"e": native(C, D), "x": native(C, D)}, backend.to_native(np.zeros(C, np.int32))
    )
    queries, noise = native(rows, D), native(rows, 1, 2) / 2
    options = {"noise": noise, "hard_negative_embeddings": native(rows, hard, D)}
    out = loss(lambda features: features["x"], queries, queries, cache, **options)
    expected = 2 * np.log(C + rows) if rows else 0.0  # of both widths
    np.testing.assert_allclose(backend.numpy(out.loss), expected, rtol=1e-5)
