"""Checks of gradients: for one draw, in closed form, and in expectation over all draws."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from negcache_core import exact
from negcache_core.arrays.backend import NUMPY
from negcache_core.arrays.exclusion import Exclusions
from negcache_core.arrays.numerics import log_sum_exp
from negcache_core.cache.named import SINGLE, Caches
from negcache_core.cache.quantized import SUFFIX, dequantize, quantize
from negcache_core.cache.state import EMPTY, NegativeCache
from negcache_core.cache.window import new_window
from negcache_core.errors import OptionError
from negcache_core.losses.estimators import ESTIMATORS, SampledSoftmax, Weights
from negcache_core.losses.surrogate import positive_weight
from negcache_core.testing._adapter import Adapter
from negcache_core.testing._scripts import TOKENS, WIDTH, assert_equal, cache_of, embed


def check_gradients(adapter: Adapter) -> None:
    """Gradients of `loss` and `training_loss` equal the closed form for the draw."""
    if adapter.gradients is None:
        return
    rng = np.random.default_rng(5)
    cache = cache_of(rng, 9)
    query, positive = rng.standard_normal((2, 4, WIDTH))
    noise, scale = rng.random((4, 1, 2)), np.asarray(1.7)
    module = adapter.module
    features = {"tokens": rng.integers(0, 11, (4, TOKENS))}
    native = adapter.native(cache)
    fresh = np.asarray(adapter.to_numpy(embed(adapter, native.data)))

    now: dict[str, Any] = {}
    loss = module.CacheClassificationLoss("embedding", ("tokens",), scale=lambda: now["scale"])

    def retrieve(query: Any, scale: Any) -> Any:
        now["scale"] = scale
        features_, noise_ = adapter.native(features), adapter.to_native(noise)
        return loss.retrieve(query, native, pos_features=features_, noise=noise_)

    drawn = retrieve(adapter.to_native(query), adapter.to_native(scale))
    slots = np.asarray(adapter.to_numpy(drawn.slots))
    arrays = [query, positive, fresh[slots], scale]
    for field in ("loss", "training_loss"):

        def value(
            query: Any, positive: Any, negatives: Any, scale: Any, *, field: str = field
        ) -> Any:
            drawn = retrieve(query, scale)
            return getattr(loss.loss_from_negatives(query, positive, negatives, drawn), field)

        given = adapter.gradients(value, [adapter.to_native(array) for array in arrays])
        expected = gradients_by_hand(
            adapter.numpy(drawn), "paper", np.eye(len(slots)), query, positive, fresh[slots], scale
        )
        assert_equal(adapter.name, f"gradient of {field}", tuple(given), tuple(expected))


def check_estimators(adapter: Adapter) -> None:
    """Every estimator's gradient equals the exact one in expectation over all draws.

    On a fresh cache that is the gradient of the softmax cross-entropy; on a stale one, the gradient
    with stale probabilities and fresh items. In-batch negatives are items like any other. With a
    window of ages the items are those inside it. Rows stored as int8 are stale like any others.
    """
    rng, scale = np.random.default_rng(8), np.asarray(1.3)
    query, positive = rng.standard_normal((2, 2, WIDTH))
    ages = {False: np.asarray([1, EMPTY, 0], np.int32), True: np.asarray([1, 9, 0], np.int32)}
    fresh = rng.standard_normal((3, WIDTH))
    stale = fresh + 0.5 * rng.standard_normal(fresh.shape)
    codes, scales = quantize(stale)
    tables = {
        "fresh": (fresh,),
        "stale": (stale,),
        "int8": (codes, scales),
    }
    plain = ("fresh", "stale")
    cases = (
        (False, False, plain),
        (True, False, plain),
        (True, True, plain),
        (True, False, ("int8",)),
    )
    for estimator in ESTIMATORS:
        for in_batch, window, stored in cases:
            age = ages[window]
            gradients = _gradients_of(adapter, estimator, age, in_batch=in_batch, window=window)
            young = age <= 1
            for what in stored:
                held = tables[what]
                table = dequantize(*held).astype(np.float64) if what == "int8" else held[0]
                items, now, counts = table, fresh, np.tile(young, (2, 1))
                if in_batch:
                    items, now = (np.concatenate([each, positive]) for each in (table, fresh))
                    counts = np.concatenate([counts, ~np.eye(2, dtype=bool)], axis=1)
                expected = exact.softmax_cross_entropy(
                    query, positive, items, fresh_items=now, scale=scale, mask=counts
                ).gradients
                expected = expected._replace(
                    positive=expected.positive + (expected.items[len(age) :] if in_batch else 0.0),
                    items=expected.items[: len(age)],
                )
                weights = np.exp(scale * query @ table.T) * young
                proposal = weights / weights.sum(axis=1, keepdims=True)
                middle = (
                    np.cumsum(proposal, axis=1) - proposal / 2
                )  # the middle of the stretch that draws a slot

                def outcome(
                    slots: list[list[int]], *, middle: Any = middle, held: Any = held
                ) -> tuple[Any, ...]:
                    second = np.take_along_axis(middle, np.asarray(slots), axis=1)
                    noise = np.stack([np.full_like(second, 0.5), second], axis=-1)
                    return tuple(gradients(query, positive, fresh, scale, noise, *held))  # noqa: B023

                given = exact.expectation(exact.enumerate_draws(proposal), outcome)
                path = f"the expected gradient of {estimator}, {what}, {in_batch=}, {window=}"
                assert_equal(adapter.name, path, given, tuple(expected), tolerance=1e-10)


def _gradients_of(
    adapter: Adapter, estimator: str, age: Any, *, in_batch: bool, window: bool
) -> Callable[..., Any]:
    """Return a function of NumPy arrays that returns a loss's gradients for one draw.

    window: whether rows compete only up to an age of four steps

    The function takes query, positive, fresh, scale, noise, and the table, or its codes and scales.
    """
    xp = adapter.module.CacheManager.backend.xp
    one_hot = np.eye(len(age))
    chosen, ages = adapter.to_native(one_hot), adapter.to_native(age)
    now: dict[str, Any] = {}
    loss = adapter.module.CacheClassificationLoss(
        "embedding",
        ("chosen",),
        scale=lambda: now["scale"],
        estimator=estimator,
        in_batch_negatives=in_batch,
        max_staleness=0.2 if window else None,
    )
    state = new_window(xp) if window else None

    def retrieve(query: Any, scale: Any, noise: Any, *held: Any) -> Any:
        now["scale"] = scale
        rows = dict(zip(("embedding", "embedding" + SUFFIX), held, strict=False))
        cache = NegativeCache({"chosen": chosen, **rows}, ages)
        return loss.retrieve(query, Caches({SINGLE: cache}, state), noise=noise)

    def value(query: Any, positive: Any, fresh: Any, scale: Any, *noise_and_rows: Any) -> Any:
        drawn = retrieve(query, scale, *noise_and_rows)
        negatives = xp.matmul(drawn.features["chosen"], fresh)
        return loss.loss_from_negatives(query, positive, negatives, drawn).loss

    def gradients(*arrays: Any) -> Any:
        native = [adapter.to_native(array) for array in arrays]
        if adapter.gradients is not None:
            return adapter.gradients(value, native[:4], *native[4:])
        query, positive, fresh, scale, *_ = arrays
        drawn = adapter.numpy(retrieve(native[0], *native[3:]))
        picked = drawn.features["chosen"]
        return gradients_by_hand(drawn, estimator, picked, query, positive, fresh, scale)

    return gradients


def check_learning(adapter: Adapter) -> None:
    """Items are refused if only some carry a gradient, unless they are named as `constant`.

    If all do, or none does, nothing is reported.
    """
    gradients = adapter.gradients
    if gradients is None:
        return
    rng = np.random.default_rng(6)
    cache = adapter.native(cache_of(rng, 5))
    noise = adapter.to_native(rng.random((4, 1, 2)))
    shapes = [(4, WIDTH), (4, WIDTH), (4, WIDTH), (4, 2, WIDTH)]
    arrays = [adapter.to_native(rng.standard_normal(shape)) for shape in shapes]
    loss = adapter.module.CacheClassificationLoss("embedding", ("tokens",))
    xp, stop = loss.backend.xp, loss.backend.stop_gradient
    names = ("positives", "negatives", "hard_negatives")

    def outcome(still: tuple[str, ...], constant: tuple[str, ...]) -> str:
        def value(query: Any, *items: Any) -> Any:
            given = {
                name: stop(each) if name in still else each
                for name, each in zip(names, items, strict=True)
            }
            drawn = loss.retrieve(query, cache, noise=noise)
            result = loss.loss_from_negatives(
                query,
                given["positives"],
                given["negatives"],
                drawn,
                hard_negative_embeddings=given["hard_negatives"],
                constant=constant,
            )
            return result.loss + sum(xp.sum(0.0 * each) for each in items)  # each has a gradient

        try:
            gradients(value, arrays)
        except OptionError as error:
            return str(error)
        return ""

    for count in range(len(names) + 1):
        for still in itertools.combinations(names, count):
            learning = tuple(name for name in names if name not in still)
            told = outcome(still, ())
            mixed = bool(still) and bool(learning)
            if (f"constant={still!r}" in told) != mixed:
                raise AssertionError(f"{adapter.name}: of constant {still} the loss says {told!r}.")
            told = outcome(still, still) if mixed else ""
            if told:
                raise AssertionError(f"{adapter.name}: with constant={still} it says {told!r}.")


def gradients_by_hand(
    drawn: Any,
    estimator: str,
    chosen: Any,
    query: Any,
    positive: Any,
    items: Any,
    scale: Any,
) -> exact.Gradients:
    """Return the gradients of the loss for one draw, by `exact.surrogate_gradients`.

    drawn: a Retrieval of NumPy arrays; chosen: (n, C), one-hot, which of the items (C, D) it drew
    """
    xp, rows = NUMPY.xp, len(query)
    scores = scale * query @ positive.T
    among = np.full(scores.shape, -np.inf)  # what competes besides the cache, exactly
    if drawn.others is not None:
        counts = drawn.others.among(np.ones(rows, bool), drawn.own or Exclusions(), xp=xp)
        among = np.where(counts, scores, -np.inf)
    log_full = None if drawn.others is None else log_sum_exp(among, xp=xp)
    softmax = SampledSoftmax(
        np.diag(scores), drawn.log_partition, drawn.drawn, log_full, drawn.pool
    )
    weights = ESTIMATORS[estimator].weigh(softmax, xp=xp)
    every = weights.every
    if weights.own is not None:  # a query's own draws, among everyone's
        every = (np.eye(rows)[:, :, None] * weights.own[None]).reshape(rows, -1)
    share = np.exp(among - softmax.log_total(xp=xp)[:, None])
    found = exact.surrogate_gradients(
        Weights(every=np.concatenate([every, share], axis=1)),
        positive_weight(softmax, weights, xp=xp),
        np.concatenate([chosen.argmax(axis=1), len(items) + np.arange(rows)])[None],
        query,
        positive,
        np.concatenate([items, positive]),
        scale=scale,
    )
    more = np.zeros_like(query)  # what the query's gradient takes from the readout
    if weights.readout is not None:
        more = weights.readout[:, None] * drawn.readout - weights.stale @ drawn.pool.stale
    return exact.Gradients(
        found.query + scale * more / rows,
        found.positive + found.items[len(items) :],
        found.items[: len(items)],
        found.scale + np.sum(query * more) / rows,
    )
