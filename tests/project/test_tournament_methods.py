"""What the tournament's ways of training cost, and that they start alike."""

import negcache_torch as negcache
import pytest
import torch

CACHE = {"cache_size": 64}


@pytest.fixture
def spied(tournament, monkeypatch):
    """Return a function: trains by a method, and returns the result and what was seen of it."""

    def train(run):
        seen = {"weights": None, "ids": [], "trained": 0, "forward": 0, "counting": False}
        method = tournament.methods.METHODS[run.method]
        forward = tournament.towers.Tower.forward

        def counted(self, tokens):
            if seen["counting"]:
                seen["trained" if torch.is_grad_enabled() else "forward"] += len(tokens)
            return forward(self, tokens)

        def counting(function):
            def counted(*arguments):
                seen["counting"] = True
                value = function(*arguments)
                seen["counting"] = False
                return value

            return counted

        def begin(setting):
            seen["weights"] = [each.detach().clone() for each in setting.model.parameters()]
            training = method(setting)
            phases = [
                phase._replace(loss=of_phase(phase), enter=counting(phase.enter))
                for phase in training.phases
            ]
            return training._replace(phases=phases)

        def of_phase(phase):
            def loss(batch):
                seen["ids"] += batch.ids.tolist()
                return counting(phase.loss)(batch)

            return loss

        with monkeypatch.context() as patch:
            patch.setattr(tournament.towers.Tower, "forward", counted)
            patch.setitem(tournament.methods.METHODS, run.method, begin)
            return tournament.training.train(run, tournament.tiny()), seen

    return train


@pytest.mark.parametrize(
    ("method", "options", "trained", "forward"),
    [
        # of a batch of 8
        ("in-batch", {}, 16, 0),
        ("in-batch", {"scale": "trained"}, 16, 0),
        ("gradient-caching", {}, 16, 16),
        ("memory", {}, 16, 0),
        ("cache", {}, 24, 0),
        ("cache", {"num_samples": 3}, 40, 0),
        ("cache", {"estimator": "paper"}, 24, 0),
        ("cache", {"estimator": "shared", "in_batch_negatives": False}, 24, 0),
        ("cache", {"refresh": 5}, 24, 5),
        ("cache", {"max_staleness": None}, 24, 0),
        ("in-batch", {"symmetric": 0.5, "hard_weight": 1.0}, 16, 0),
        ("cache", {"symmetric": 0.5}, 24, 0),
        ("cache", {"other_direction": 0.5}, 32, 0),
        ("cache", {"other_direction": 0.5, "num_samples": 3, "refresh": 5}, 64, 10),
        ("cache", {"residual_mix": True, "hard_weight": 1.0}, 24, 0),
        ("full-softmax", {}, 8, 0),  # its items have no price
    ],
)
def test_calls_are_those_that_the_towers_had(tournament, spied, method, options, trained, forward):
    result, seen = spied(tournament.run_of(method, budget=400, options={**CACHE, **options}))
    last = result["curve"][-1]
    if "refresh" in options:
        seen["forward"] += forward  # the first one is paid for, and finds an empty cache
    assert (seen["trained"], seen["forward"]) == (trained * last["steps"], forward * last["steps"])
    if method != "full-softmax":
        counted = seen["trained"] + tournament.method.FORWARD_ONLY * seen["forward"]
        assert last["calls"] == pytest.approx(counted)
    assert last["calls"] <= 400


def test_a_prefill_is_paid_for(tournament, spied):
    options = {**CACHE, "prefill": True}
    result, seen = spied(tournament.run_of("cache", budget=400, options=options))
    last = result["curve"][-1]
    assert seen["forward"] == 64
    assert last["calls"] == pytest.approx(24 * last["steps"] + 64 / 3)
    assert last["steps"] == int((400 - 64 / 3) / 24)


@pytest.mark.parametrize(
    ("options", "warm", "early", "late", "forward"),
    [
        # steps at 16, at 24 and at 40 calls, of 960
        ({"warm_in_batch": 0.25}, 15, 30, 0, 0),
        ({"late_draws": 3}, 0, 20, 12, 0),
        ({"warm_in_batch": 0.25, "late_draws": 3}, 15, 10, 12, 0),
        ({"warm_in_batch": 0.25, "prefill": True}, 15, 29, 0, 64),
    ],
)
def test_each_phase_has_its_share_of_the_budget(
    tournament, spied, options, warm, early, late, forward
):
    run = tournament.run_of("cache", budget=960, options={**CACHE, **options})
    result, seen = spied(run)
    last = result["curve"][-1]
    assert last["steps"] == warm + early + late
    assert seen["trained"] == 16 * warm + 24 * early + 40 * late
    assert seen["forward"] == forward
    assert last["calls"] == pytest.approx(seen["trained"] + seen["forward"] / 3)
    quarter, half = (result["curve"][place] for place in (2, 4))
    assert quarter["calls"] == pytest.approx(240, abs=13)
    assert half["calls"] == pytest.approx(480, abs=20)
    if warm:  # its items are there when the cache comes into use, or a prefill's
        assert result["curve"][3]["fill"] == 1.0
        assert "staleness" not in result["curve"][1]


def test_a_map_that_is_held_at_zero_changes_nothing(tournament):
    task = tournament.tiny()
    plain, held = (
        tournament.training.train(tournament.run_of("cache", budget=500, options=options), task)
        for options in (CACHE, {**CACHE, "drift": 1e30})
    )
    for first, second in zip(plain["curve"], held["curve"], strict=True):
        for key in ("loss", "test MRR", "staleness", "calls"):
            assert first[key] == pytest.approx(second[key], rel=1e-4)


def test_options_of_another_method_are_refused(tournament):
    for method, option in [("in-batch", "prefill"), ("memory", "symmetric")]:
        run = tournament.run_of(method, options={option: 0.5})
        with pytest.raises(SystemExit, match=f"{method} takes the options .*, and not .'{option}'"):
            tournament.training.train(run, tournament.tiny())


@pytest.mark.parametrize(
    "options",
    [
        {"symmetric": 1.0},
        {"symmetric": -0.1},
        {"symmetric": 0.5, "other_direction": 0.5},
        {"hard_weight": -1.0},
    ],
)
def test_weights_that_leave_nothing_are_refused(tournament, options):
    method = "cache" if "other_direction" in options else "in-batch"
    with pytest.raises(SystemExit, match=next(iter(options))):
        tournament.training.train(tournament.run_of(method, options=options), tournament.tiny())


@pytest.mark.parametrize("estimator", ["paper", "shared", "exact_query"])
def test_corrected_queries_draw_as_from_a_cache_of_corrected_rows(tournament, estimator):
    generator = torch.Generator().manual_seed(0)
    width = tournament.towers.WIDTH
    rows, queries = (torch.randn(n, width, generator=generator) / 8 for n in (40, 6))
    learned = tournament.drift.DriftMap()
    turn = torch.linalg.matrix_exp(torch.randn(width, width, generator=generator) / 50)
    learned.learn(rows, rows @ turn + 0.05)
    assert learned.map.abs().amax() > 0.01

    def loss_fn(embeddings):
        handler = negcache.NegativeCacheLoss(
            40, {"row": torch.zeros(1, dtype=torch.int64)}, width, estimator=estimator, generator=0
        )
        handler.prefill(lambda given: embeddings[given["row"]], {"row": torch.arange(40)}, 40)
        return handler

    features = {"row": torch.arange(6)}
    noise = torch.rand(6, 1, 2, generator=generator)
    moved, gain = learned.of_queries(queries)
    wanted = loss_fn(learned.of_rows(rows)).retrieve(queries, features, noise=noise)
    found = loss_fn(rows).retrieve(moved, features, noise=noise)
    found = learned.of_retrieval(found, 20 * gain)
    assert torch.equal(found.features["row"], wanted.features["row"])
    names = ["log_partition", "entropy", "stale_embeddings", "readout"]
    pairs = [(getattr(found, name), getattr(wanted, name)) for name in names]
    if estimator != "paper":
        pairs += zip(found.pool, wanted.pool, strict=True)
    for mine, theirs in pairs:
        if theirs is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_the_map_foresees_how_other_rows_have_moved(tournament):
    generator = torch.Generator().manual_seed(0)
    width = tournament.towers.WIDTH
    turn = torch.linalg.matrix_exp(torch.randn(width, width, generator=generator) / 50)
    learned = tournament.drift.DriftMap()
    for _ in range(40):
        rows = torch.nn.functional.normalize(torch.randn(64, width, generator=generator))
        figures = learned.learn(rows, rows @ turn + 0.02)
    assert figures["drift_residual"] < 0.1 * figures["drift"]


def test_all_methods_have_the_same_first_weights_and_order_of_pairs(tournament, spied):
    batches = {"in-batch": 16, "gradient-caching": 12, "memory": 8, "cache": 8, "full-softmax": 4}
    assert set(batches) == set(tournament.methods.METHODS)
    seen = [
        spied(tournament.run_of(method, batch, budget=600))[1] for method, batch in batches.items()
    ]
    shortest = min(len(each["ids"]) for each in seen)
    assert shortest > 150
    for each in seen[1:]:
        assert each["ids"][:shortest] == seen[0]["ids"][:shortest]
        for mine, first in zip(each["weights"], seen[0]["weights"], strict=True):
            assert torch.equal(mine, first)
    other = spied(tournament.run_of(seed=1, budget=600))[1]
    assert other["ids"][:shortest] != seen[0]["ids"][:shortest]
    assert not torch.equal(other["weights"][1], seen[0]["weights"][1])
