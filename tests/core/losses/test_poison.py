"""Poison: an embedding that is not finite reaches its own query alone."""

import numpy as np
import pytest
import torch
from backends import BACKENDS, TORCH

from negcache_core.cache.state import EMPTY, NegativeCache
from negcache_core.losses.estimators import ESTIMATORS

B, H, C, K, D = 4, 2, 6, 3, 2
SICK = 1  # the query that something is wrong with
WELL = [row for row in range(B) if row != SICK]
OTHERS = {row: [other for other in range(B) if other != row] for row in range(B)}
FACTORS = [0.5, 0.25, 2.0, 1.5]
TOLERANCE = {"rtol": 1e-12, "atol": 1e-12}


class Step:
    """One step of linear towers in which one query's embeddings may be poisoned."""

    def __init__(self, backend, **options):
        rng = np.random.default_rng(3)
        self.backend, self.options, self.metrics = backend, options, None
        self.xp = backend.module.CacheManager.backend.xp
        self.y, self.x = rng.normal(size=(2, B, K))
        self.hard, self.noise = rng.normal(size=(B, H, K)), rng.random((B, 1, 2))
        self.towers = [backend.to_native(each) for each in rng.normal(size=(2, K, D))]
        self.towers.append(backend.to_native(np.asarray(1.5)))
        table = rng.normal(size=(C, K))
        data = {"x": table, "embedding": table @ rng.normal(size=(K, D))}
        age = np.asarray([0, 3, 1, EMPTY, 2, 0], np.int32)
        self.cache = backend.native(NegativeCache(data, age))

    def losses(self, towers, ill=None, value=np.nan, rows=range(B), competitors=None, hard=H):
        """Return the loss of each of `rows`.

        ill:         what of the sick query is poison: "query", "positive", "drawn" or "hard"
        competitors: row -> rows whose positives are hard negatives of it, instead of in-batch ones
        hard:        how many of a query's own hard negatives there are, from the last one
        """
        V, W, scale = towers
        rows, native, xp = list(rows), self.backend.to_native, self.xp

        def poisoned(name, array):
            sick = np.zeros(array.shape, bool)
            if name == ill:
                sick[(rows.index(SICK), 0) if name == "hard" else rows.index(SICK)] = True
            return xp.where(native(sick), value, array)

        def embed(x, tower):
            return xp.reshape(xp.matmul(native(x.reshape(-1, K)), tower), (*x.shape[:-1], D))

        in_batch = self.options["in_batch_negatives"]
        x_hard = self.hard[rows, H - hard :]
        if in_batch and competitors is not None:
            in_batch = False
            x_hard = np.concatenate([x_hard, [self.x[competitors[row]] for row in rows]], axis=1)
        loss = self.backend.module.CacheClassificationLoss(
            "embedding",
            ("x",),
            reducer=None,
            scale=scale,
            **{**self.options, "in_batch_negatives": in_batch},
        )
        query = poisoned("query", embed(self.y[rows], V))
        drawn = loss.retrieve(
            query,
            self.cache,
            pos_features={"x": native(self.x[rows])},
            noise=native(self.noise[rows]),
        )
        result = loss.loss_from_negatives(
            query,
            poisoned("positive", embed(self.x[rows], W)),
            poisoned("drawn", xp.matmul(drawn.features["x"], W)),
            drawn,
            hard_negative_embeddings=poisoned("hard", embed(x_hard, W)),
        )
        self.metrics = {key: np.asarray(value) for key, value in result.metrics.items()}
        return dict(zip(rows, [result.loss[place] for place in range(len(rows))], strict=True))

    def total(self, counted, **case):
        """Return the weighed sum of some rows' losses and its gradient by both towers and scale."""

        def value(*towers):
            losses = self.losses(towers, **case)
            return sum(FACTORS[row] * losses[row] for row in counted)

        return float(value(*self.towers)), self.backend.gradients(value, self.towers)


def assert_equal(ours, theirs):
    np.testing.assert_allclose(ours[0], theirs[0], **TOLERANCE)
    for mine, reference in zip(ours[1], theirs[1], strict=True):
        assert np.isfinite(mine).all()
        np.testing.assert_allclose(mine, reference, **TOLERANCE)


CASES = [
    (name, estimator, correction)
    for name in ("torch", "tensorflow", "jax")
    for estimator in sorted(ESTIMATORS)
    for correction in (False, True)
    if name != "jax" or correction  # which compiles every operation
]


@pytest.mark.parametrize(
    ("name", "estimator", "correction", "value"),
    [
        (*case, value)
        for case in CASES
        for value in (np.nan, -np.inf)
        if case[0] == "torch" or np.isnan(value)
    ],
)
def test_poison_reaches_no_other_query(name, estimator, correction, value):
    """Each other query's loss and gradient are those of a batch in which nothing is wrong."""
    step = Step(
        BACKENDS[name],
        estimator=estimator,
        in_batch_negatives=True,
        staleness_correction=correction,
    )
    bad = {"value": value}
    # A query: to the others it is as if it were not there, but for its positive.
    without = step.total(WELL, rows=WELL, competitors=OTHERS)
    assert_equal(step.total(WELL, ill="query", **bad), without)
    assert step.metrics["nonfinite_count"] == 0
    # A positive: the query still draws, and the positive is no negative of the others.
    fewer = {row: [other for other in OTHERS[row] if other != SICK][:2] for row in range(B)}
    left = step.total(WELL, competitors=fewer)
    assert_equal(step.total(WELL, ill="positive", **bad), left)
    assert step.metrics["nonfinite_count"] == 1
    # Its own loss is NaN and pulls nowhere: the sum has the others' gradient.
    total, gradients = step.total(range(B), ill="positive", **bad)
    assert np.isnan(total)
    assert_equal((left[0], gradients), left)
    # A hard negative: left out of its own query, too.
    healthy = step.total(WELL)
    assert_equal(step.total(WELL, ill="hard", **bad), healthy)
    assert step.metrics["nonfinite_count"] == 1
    assert_equal(step.total([SICK], ill="hard", **bad), step.total([SICK], hard=H - 1))
    # A drawn row: to the paper's estimator it is its own query's alone.
    total, gradients = step.total(range(B), ill="drawn", **bad)
    assert step.metrics["nonfinite_count"] == 1
    if correction:
        assert np.isfinite(total)
        assert all(np.isfinite(each).all() for each in gradients)
    else:  # the value comes from stale scores
        np.testing.assert_allclose(total, step.total(range(B))[0], **TOLERANCE)
    if estimator == "paper":
        assert_equal(step.total(WELL, ill="drawn", **bad), healthy)


@pytest.mark.parametrize("draws", [1, 3])
def test_nothing_pulls_where_every_draw_is_left_out(draws):
    """The positive is pulled as hard as its negatives push: not at all without any."""
    cache = NegativeCache(
        {"x": torch.ones(4, 1), "embedding": torch.ones(4, D)}, torch.zeros(4, dtype=torch.int32)
    )
    torch.manual_seed(0)  # an unlucky draw has a loss below 0.5
    queries, positives = (torch.randn(2, D, requires_grad=True) for _ in range(2))
    loss = TORCH.module.CacheClassificationLoss("embedding", ("x",), num_samples=draws)
    out = loss(lambda features: features["x"] * torch.nan + queries[:1], queries, positives, cache)
    assert float(out.interpretable_loss.detach()) > 0.5  # the cache counts in the value
    for gradient in torch.autograd.grad(out.loss, [queries, positives]):
        np.testing.assert_array_equal(gradient, 0.0)
