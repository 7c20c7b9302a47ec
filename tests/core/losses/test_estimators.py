"""Every estimator, with every option: enumerated over all draws, its gradient is the exact one."""

import numpy as np
import pytest
import torch
from backends import BACKENDS
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import TOLERANCE, expected_gradients, noise_for
from strategies import towers

from negcache_core import CacheClassificationLoss, exact
from negcache_core.cache.state import NegativeCache
from negcache_core.errors import DTypeError, KeysError, OptionError, ShapeError
from negcache_core.losses.estimators import ESTIMATORS, SampledSoftmax, paper, shared
from negcache_core.retrieval.proposal import log_proposals, pool_of

IDS = 3  # few, so that items meet themselves
# The outcomes grow as slots ** queries; PyTorch is the fastest, and goes through the most.
SLOTS = {"torch": 5, "tensorflow": 3, "jax.jit": 3}


class Options:
    """What a test draws besides the towers: labels of rows, frequencies, hard negatives, …."""

    def __init__(self, data, problem, *, in_batch):
        rows, slots, width = len(problem.y), len(problem.age), problem.W.shape[1]
        rng = np.random.default_rng(data.draw(st.integers(0, 2**16), label="options seed"))
        self.estimator = data.draw(st.sampled_from(sorted(ESTIMATORS)), label="estimator")
        self.top_k = None
        if self.estimator != "exact_query":
            self.top_k = data.draw(st.none() | st.integers(1, slots), label="top_k")
        self.in_batch, self.correction = in_batch, False
        self.split = data.draw(st.booleans(), label="two caches") and slots > 1
        self.frequencies = self.positive_ids = self.hard = self.weight = self.margin = None
        self.id_keys = ("id", "query_id")[: data.draw(st.integers(0, 2), label="id_keys")]
        self.group_key = data.draw(st.none() | st.just("group"), label="group_key")
        kinds = {**dict.fromkeys(self.id_keys, IDS), **({"group": 2} if self.group_key else {})}
        # Of the cache, of the batch's positives, and of hard negatives.
        self.labels = [
            {key: rng.integers(0, kind, shape) for key, kind in kinds.items()}
            for shape in (slots, rows, (rows, 2))
        ]
        self.own = {key: self.labels[1][key][:, None] for key in self.id_keys}
        if self.id_keys and data.draw(st.booleans(), label="several positives"):
            key = data.draw(st.sampled_from(self.id_keys), label="of")
            more = rng.integers(-1, IDS, (rows, 1))
            self.own[key] = np.concatenate([self.own[key], more], axis=1)
            first = key == self.id_keys[0]
            self.positive_ids = self.own[key] if first else {key: self.own[key]}
        if data.draw(st.booleans(), label="margin"):
            self.margin = float(rng.normal())
        if data.draw(st.booleans(), label="frequencies"):
            self.frequencies = rng.normal(size=slots), rng.normal(size=rows)
        if data.draw(st.booleans(), label="hard negatives"):
            self.hard = rng.normal(size=(rows, 2, width))
        self.told = self.hard is not None and data.draw(st.booleans(), label="labels of these")
        if data.draw(st.booleans(), label="sample weight"):
            self.weight = rng.random(rows) * 2
        # Of one query at a time, of some, and all at once.
        self.tile_bytes = data.draw(st.sampled_from([1, 64, None]), label="tile_bytes")

    def loss_of(self, module, scale):
        return module.CacheClassificationLoss(
            "embedding",
            ("x",),
            top_k=self.top_k,
            scale=scale,
            estimator=self.estimator,
            in_batch_negatives=self.in_batch,
            id_keys=self.id_keys,
            group_key=self.group_key,
            margin=self.margin,
            log_frequency_key=None if self.frequencies is None else "log_frequency",
            staleness_correction=self.correction,
            tile_bytes=self.tile_bytes,
        )

    def fields(self, side):
        """Return the fields of the cache (0) or of the batch's positives (1)."""
        found = dict(self.labels[side])
        if self.frequencies is not None:
            found["log_frequency"] = self.frequencies[side]
        return found

    def arguments(self, backend):
        given = {
            "positive_ids": self.positive_ids,
            "hard_negative_embeddings": self.hard,
            "hard_negative_features": self.labels[2] if self.told else None,
            "sample_weight": self.weight,
        }
        native = {k: backend.native(v) for k, v in given.items() if v is not None}
        return {**native, "constant": ("hard_negatives",)}

    def opposed(self, labels, scores, positive, *, told=True):
        """Return which scores (B, n) may count, one by one; labels are (n,) or (B, n)."""
        counts = np.ones(scores.shape, bool)
        for query, row in np.ndindex(scores.shape):
            mine = {k: v[query, row] if v.ndim == 2 else v[row] for k, v in labels.items()}
            if told:
                alike = [mine[key] in self.own[key][query] for key in self.id_keys]
                elsewhere = self.group_key and mine["group"] != self.labels[1]["group"][query]
                counts[query, row] = not any(alike) and not elsewhere
            if self.margin is not None:
                counts[query, row] &= scores[query, row] <= positive[query] + self.margin
        return counts

    def stale_logits(self, problem):
        """Return (B, C): what each query's softmax has for each slot, -inf for no negative."""
        queries = problem.scale * problem.y @ problem.V
        scores = queries @ problem.cache_data["embedding"].T
        positive = (queries * (problem.x_positive @ problem.W)).sum(axis=1)
        logits = scores if self.frequencies is None else scores - self.frequencies[0]
        logits = np.where(self.opposed(self.labels[0], scores, positive), logits, -np.inf)
        logits = np.where(problem.written, logits, -np.inf)
        if self.top_k is not None:
            best = np.zeros(logits.shape, bool)
            for group in np.array_split(np.arange(logits.shape[1]), self.top_k):
                best[np.arange(len(logits)), group[logits[:, group].argmax(axis=1)]] = True
            logits = np.where(best, logits, -np.inf)
        return logits


def exact_gradients(problem, options):
    """Differentiate the full cross-entropy: stale probabilities, fresh scores; with PyTorch."""
    V, W, scale = (
        torch.tensor(array, requires_grad=True) for array in (problem.V, problem.W, problem.scale)
    )
    y, x, x_positive = map(torch.as_tensor, (problem.y, problem.x, problem.x_positive))
    query, positive, items = scale * (y @ V), x_positive @ W, x @ W
    logits, scores = [torch.as_tensor(options.stale_logits(problem))], [query @ items.T]
    own = (query * positive).sum(1, keepdim=True)
    rows, known = len(y), own.detach().numpy()[:, 0]

    def kept(logits, labels, **more):
        counts = options.opposed(labels, logits.numpy(), known, **more)
        return logits.masked_fill(~torch.as_tensor(counts), -torch.inf)

    if options.in_batch:
        between = query @ positive.T
        shift = torch.zeros(rows)
        if options.frequencies is not None:
            shift = torch.as_tensor(options.frequencies[1])
        scores.append(between)
        logit = kept(between.detach(), options.labels[1]) - shift
        logits.append(logit.masked_fill(torch.eye(rows, dtype=torch.bool), -torch.inf))
    if options.hard is not None:
        hard = torch.einsum("bd,bhd->bh", query, torch.as_tensor(options.hard))
        scores.append(hard)
        logits.append(kept(hard.detach(), options.labels[2], told=options.told))
    logits, scores = torch.cat([own.detach(), *logits], 1), torch.cat([own, *scores], 1)
    probabilities = torch.softmax(logits, dim=1)
    probabilities[:, 0] -= 1
    weight = torch.ones(rows) if options.weight is None else torch.as_tensor(options.weight)
    total = ((probabilities * scores).sum(1) * weight).mean()
    value = ((torch.logsumexp(logits, 1) - logits[:, 0]) * weight).mean()
    return torch.autograd.grad(total, [V, W, scale]), value


def law_of(options, problem):
    weights = np.exp(options.stale_logits(problem))
    weights[:, 0] += ~(weights > 0).any(axis=1)
    return weights / weights.sum(axis=1, keepdims=True)


def assert_unbiased(name, problem, options, moved=None):
    """Compare with the exact gradient; the cache's embeddings lag `moved` (D,) behind."""
    if name.startswith("jax"):
        options.tile_bytes = None  # each loop over chunks would be compiled anew
    backend, now = BACKENDS[name], {}
    native = backend.to_native
    loss = options.loss_of(backend.module, lambda: now["scale"])
    data = {**problem.cache_data, **options.fields(0)}
    if moved is not None:
        data["embedding"] = data["embedding"] - moved
    cut = len(problem.age) // 2 if options.split else 0
    cache = {
        name: backend.native(
            NegativeCache({k: v[part] for k, v in data.items()}, problem.age[part])
        )
        for name, part in (("a", slice(cut)), ("b", slice(cut, None)))
        if name == "b" or cut
    }
    y, x_positive = native(problem.y), native(problem.x_positive)
    features = {"x": x_positive, **{k: native(v) for k, v in options.fields(1).items()}}
    law = law_of(options, problem)
    outcomes = [
        (native(noise_for(slots, law, cut if options.top_k is None else 0)), probability)
        for slots, probability in exact.enumerate_draws(law)
    ]
    arguments = options.arguments(backend)
    expected, value_expected = exact_gradients(problem, options)

    def value(V, W, scale, noise):
        now["scale"] = scale
        return loss(
            lambda features: features["x"] @ W,
            y @ V,
            x_positive @ W,
            cache,
            pos_features=features,
            noise=noise,
            **arguments,
        ).loss

    arrays = tuple(native(each) for each in (problem.V, problem.W, problem.scale))
    given = expected_gradients(backend, value, arrays, outcomes)
    for which, ours, theirs in zip("VWs", given, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, err_msg=which, **TOLERANCE)
    if moved is not None:
        return  # the value comes from stale scores
    for noise, _ in outcomes if name == "torch" else outcomes[:1]:  # it depends on no draw
        found = backend.run(lambda given, _: value(*given), (*arrays, noise), {})
        np.testing.assert_allclose(backend.to_numpy(found), float(value_expected), **TOLERANCE)


@pytest.mark.parametrize("in_batch", [False, True], ids=["cache alone", "in-batch"])
@pytest.mark.parametrize("name", ["torch", "tensorflow"])
def test_expected_gradient_is_exact_with_every_option(name, in_batch):
    # An example takes TensorFlow several times as long.
    @settings(max_examples=settings.default.max_examples // {"torch": 1, "tensorflow": 3}[name])
    @given(data=st.data())
    def run(data):
        stale = data.draw(st.booleans(), label="stale")
        problem = data.draw(towers(stale=stale, max_slots=SLOTS[name], min_queries=1 + in_batch))
        options = Options(data, problem, in_batch=in_batch)
        options.correction = not stale and data.draw(st.booleans(), label="correction")
        assert_unbiased(name, problem, options)

    run()


@pytest.mark.parametrize(("name", "part"), [("torch", 5), ("tensorflow", 10), ("jax.jit", 20)])
def test_the_correction_is_exact_where_all_rows_have_moved_alike(name, part):
    """Stale probabilities are right then, but for the share of the cache, which is corrected."""

    @settings(max_examples=settings.default.max_examples // part)  # JAX compiles for each
    @given(data=st.data())
    def run(data):
        problem = data.draw(towers(stale=False, max_slots=SLOTS[name], min_queries=2))
        options = Options(data, problem, in_batch=data.draw(st.booleans(), label="in-batch"))
        options.correction = True
        options.margin = None  # which compares stale scores with fresh ones
        moved = np.random.default_rng(0).normal(size=problem.W.shape[1])
        assert_unbiased(name, problem, options, moved)

    run()


def test_the_correction_needs_no_more_than_one_slot_to_be_exact():
    """One slot: every draw is it, so the corrected gradient is that of the fresh softmax."""
    fresh, stale, query = np.asarray([[0.3, 2.0]]), np.asarray([[1.0, -1.0]]), ROWS[3:5]
    cache = NegativeCache({"x": stale, "embedding": stale}, np.zeros(1, np.int32))
    torch_module = BACKENDS["torch"].module
    for estimator in sorted(ESTIMATORS):
        loss = torch_module.CacheClassificationLoss(
            "embedding", ("x",), scale=2.0, estimator=estimator, staleness_correction=True
        )
        given = [torch.tensor(each, requires_grad=True) for each in (query, ROWS[:2], fresh)]
        out = loss(
            lambda features, item=given[2]: item.expand(len(features["x"]), 2),
            given[0],
            given[1],
            BACKENDS["torch"].native(cache),
        )
        ours = torch.autograd.grad(out.loss, given)
        theirs = exact.softmax_cross_entropy(query, ROWS[:2], fresh, scale=2.0).gradients
        for mine, exactly in zip(ours, theirs[:3], strict=True):
            np.testing.assert_allclose(mine, exactly, rtol=1e-12)


@pytest.mark.parametrize("name", ["tf.function", "tf.function+xla", "jax", "jax.jit"])
@settings(max_examples=3)
@given(data=st.data())
def test_expected_gradient_is_exact_when_traced_and_compiled(name, data):
    problem = data.draw(towers(stale=True, max_slots=3, min_queries=2))
    assert_unbiased(name, problem, Options(data, problem, in_batch=True))


def law_with(rng, rows, draws, slots):
    """Return a SampledSoftmax of random scores from which `draws` rows a query were drawn."""
    scores = 3 * rng.standard_normal((rows, slots))
    drawn = rng.integers(0, slots, rows * draws)
    log_partition = np.log(np.exp(scores).sum(axis=1))
    exact_scores = rng.standard_normal(rows) if rng.random() < 0.5 else None
    return SampledSoftmax(
        rng.standard_normal(rows),
        log_partition,
        np.ones((rows, draws), bool),
        exact_scores,
        pool_of(
            np.zeros((len(drawn), 1)),
            scores[:, drawn],
            log_proposals(scores[:, drawn], log_partition, xp=np),
            draws,
            xp=np,
        ),
    )


@given(st.integers(0, 2**16), st.integers(1, 5), st.integers(1, 3))
def test_no_weight_exceeds_what_the_paper_gives_one_draw(seed, rows, draws):
    law = law_with(np.random.default_rng(seed), rows, draws, slots=6)
    weights, bound = shared(law, xp=np).every, paper(law, xp=np).own[:, :1]
    assert (weights >= 0).all()
    assert (weights <= bound * (1 + 1e-12)).all()
    miss = 1 / (1 + np.exp(-law.log_odds(xp=np)))
    assert (bound * draws <= miss[:, None] * (1 + 1e-12)).all()


ROWS = np.arange(12.0).reshape(6, 2) / 10


def plain_cache(ids=(1, 1, 1, 2, 2, 0), age=(0, 0, 0, 0, 0, 2**31 - 1)):
    data = {"x": ROWS, "embedding": ROWS, "id": np.asarray(ids)}
    return NegativeCache(data, np.asarray(age, np.int32))


def call(cache, **options):
    loss = CacheClassificationLoss(
        "embedding", ("x",), id_key="id", generator=0, **{"estimator": "shared", **options}
    )
    features = {"x": ROWS[:2], "id": np.asarray([1, 2])}
    return loss, loss.retrieve(ROWS[:2], cache, pos_features=features)


@pytest.mark.parametrize("estimator", sorted(ESTIMATORS))
def test_a_false_negative_is_never_drawn_or_counted(estimator):
    loss, drawn = call(plain_cache(), estimator=estimator, num_samples=64)
    assert set(np.reshape(drawn.slots, drawn.drawn.shape)[0]) == {3, 4}
    assert set(np.reshape(drawn.slots, drawn.drawn.shape)[1]) == {0, 1, 2}
    scores = ROWS[:2] @ ROWS.T
    expected = [np.logaddexp.reduce(scores[0, 3:5]), np.logaddexp.reduce(scores[1, :3])]
    np.testing.assert_allclose(drawn.log_partition, expected, rtol=1e-12)
    # Only positives of the first query are left: it has no negative, and its loss is 0.
    loss, drawn = call(plain_cache(ids=(1,) * 6), estimator=estimator, reducer=None)
    assert drawn.drawn.tolist() == [[False], [True]]
    out = loss.loss_from_negatives(ROWS[:2], ROWS[:2], drawn.features["x"], drawn)
    assert out.interpretable_loss[0] == out.training_loss[0] == 0
    np.testing.assert_array_equal(drawn.features["x"][0], ROWS[0])  # its own positive stands in


def test_a_drawn_row_that_is_not_finite_reaches_no_other_query():
    loss, drawn = call(plain_cache(), reducer=None)
    fresh = drawn.features["x"].copy()
    fresh[0] = np.nan
    out = loss.loss_from_negatives(ROWS[:2], ROWS[:2], fresh, drawn)
    assert np.isfinite(out.loss).all()
    assert out.updated_item_mask.tolist() == [False, True]
    assert out.metrics["nonfinite_count"] == 1


@pytest.mark.parametrize("estimator", sorted(ESTIMATORS))
def test_a_query_that_is_not_finite_reaches_no_other(estimator):
    loss = CacheClassificationLoss(
        "embedding", ("x",), estimator=estimator, reducer=None, generator=0
    )
    queries = ROWS[:3].copy()
    queries[1] = np.nan
    drawn = loss.retrieve(queries, plain_cache(), pos_features={"x": ROWS[:3]})
    out = loss.loss_from_negatives(queries, ROWS[:3], drawn.features["x"], drawn)
    assert np.isfinite(out.loss).tolist() == [True, False, True]
    assert drawn.drawn[:, 0].tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "best"}, "estimator is 'best': expected one of"),
        ({"estimator": "shared", "retrieval_fn": len}, "needs the probabilities of the draws"),
        ({"staleness_correction": True, "retrieval_fn": len}, "leave one of the two out"),
        ({"estimator": "exact_query", "score_transform": abs}, "use scale= for a temperature"),
        ({"estimator": "exact_query", "top_k": 3}, "reads out the whole cache"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        CacheClassificationLoss("embedding", ("x",), **options)


@pytest.mark.parametrize(
    ("options", "arguments", "error", "message"),
    [
        ({}, {"positive_ids": [1, 2]}, OptionError, "loss without id_key"),
        ({"id_key": "item"}, {}, KeysError, "lacks \\['item'\\]"),
        ({"id_key": "id"}, {"pos_features": {"x": ROWS[:2]}}, KeysError, "pos_features lack 'id'"),
        ({"id_key": "x"}, {}, ShapeError, "field 'x' has shape"),
        ({"id_key": "weight"}, {}, DTypeError, "expected integer values"),
        ({"id_key": "id"}, {"positive_ids": [1, 2, 3]}, ShapeError, "positive_ids has shape"),
        ({"id_key": "id"}, {"positive_ids": [1.0, 2.0]}, DTypeError, "positive_ids has dtype"),
        ({"log_frequency_key": "id"}, {}, DTypeError, "expected floating values"),
        ({}, {"sample_weight": [1.0]}, ShapeError, "sample_weight has shape"),
        ({}, {"hard_negative_embeddings": ROWS[:2]}, ShapeError, "hard_negative_embeddings has"),
    ],
)
def test_bad_arguments_are_refused(options, arguments, error, message):
    cache = plain_cache()
    cache.data["weight"] = np.zeros(6)
    loss = CacheClassificationLoss("embedding", ("x",), in_batch_negatives=True, **options)
    with pytest.raises(error, match=message):
        loss(
            lambda data: data["x"],
            ROWS[:2],
            ROWS[:2],
            cache,
            **{"pos_features": {"x": ROWS[:2], "id": np.asarray([1, 2])}, **arguments},
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("estimator", sorted(ESTIMATORS))
def test_gradients_are_finite_under_masks_in_autocast(dtype, estimator):
    """Scale first, then mask: a learned temperature meets infinite scores nowhere."""
    torch.manual_seed(0)
    module = BACKENDS["torch"].module
    log_scale = torch.nn.Parameter(torch.tensor(2.0))
    specs = {"x": ((8,), "float32"), "id": ((), "int64"), "embedding": ((4,), "float32")}
    handler = module.CacheLossHandler(
        module.CacheManager({key: module.FieldSpec(*spec) for key, spec in specs.items()}, 300),
        module.CacheClassificationLoss(
            "embedding",
            ("x",),
            estimator=estimator,
            scale=log_scale.exp,
            id_key="id",
            in_batch_negatives=True,
            generator=0,
        ),
        embedding_key="embedding",
        data_keys=("x",),
    )
    tower = torch.nn.Linear(8, 4)
    for step in range(4):
        features = {"x": torch.randn(6, 8), "id": torch.randint(0, 2 + 3 * step, (6,))}
        with torch.autocast("cpu", dtype):
            loss = handler.update_cache_and_compute_loss(
                lambda data: tower(data["x"]),
                tower(torch.randn(6, 8)),
                tower(features["x"]),
                features,
                hard_negative_embeddings=tower(torch.randn(6, 2, 8)),
            )
        gradients = torch.autograd.grad(loss, [log_scale, *tower.parameters()])
        assert loss.dtype == torch.float32
        assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert any(gradient.abs().sum() > 0 for gradient in gradients)
