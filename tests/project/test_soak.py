"""The soak at small size, and that it notices what it is there to notice."""

import json
from pathlib import Path

import numpy as np
import pytest
from programs import run

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SHORT = ("--steps", "60", "--turn", "40", "--seed", "16")


@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_a_short_soak_finds_nothing(framework):
    done = run("-W", "error", BENCHMARKS / "soak.py", framework, *SHORT, timeout=600)
    assert "60/60" in done.stderr  # the progress bar
    figures = json.loads(done.stdout)
    assert (figures["steps"], figures["handlers"]) == (60, 1)
    assert figures["raised"] > 0
    assert figures["refreshes"] > 0
    assert figures["not_finite"] > 0
    assert 0 < figures["gradient_error"] < 1e-10
    assert not any(
        figures["conclusive"].values()
    )  # nobody should read anything into so few samples


@pytest.fixture(scope="module")
def modules():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        import _soak_memory  # noqa: PLC0415 - found from here on
        import _soak_numpy  # noqa: PLC0415
        import soak  # noqa: PLC0415

        yield soak, _soak_numpy, _soak_memory


@pytest.fixture
def started(modules):
    soak, backend, _ = modules
    started = soak.Soak(backend, 0)
    for _ in range(10):
        started.step()
    started.check(())
    return started


def other_row(started):
    started.soaked.cache().data["embedding"][0, 0] += 1.0


def other_age(started):
    started.soaked.cache().age[0] += 1


def uniform_draws(started):
    started.soaked.draw = lambda y: np.random.default_rng(0).integers(0, 10, len(y))


@pytest.mark.parametrize(
    ("plant", "message"),
    [
        (other_row, "rows of embedding are not the model's"),
        (other_age, "ages are not the model's"),
        (uniform_draws, "standard deviations off"),
    ],
)
def test_a_planted_fault_is_noticed(modules, started, plant, message):
    plant(started)
    with pytest.raises(modules[0].UnsoundError, match=message):
        started.check(())


def test_a_biased_gradient_is_noticed(modules, started, monkeypatch):
    soak, backend, _ = modules
    honest = backend.gradients

    def biased(problem, estimator):
        of = honest(problem, estimator)
        return lambda noise: tuple(each + 1e-9 for each in of(noise))

    monkeypatch.setattr(backend, "gradients", biased)
    with pytest.raises(soak.UnsoundError, match=r"expected gradient is off by 1\.0"):
        started.check(("paper",))


def test_a_state_that_is_not_loaded_is_noticed(modules, started, monkeypatch, tmp_path):
    soak, backend, _ = modules
    monkeypatch.setattr(backend.Soaked, "load", lambda self, path: None)
    started.change(tmp_path)
    with pytest.raises(soak.UnsoundError, match="ages are not the model's"):
        started.check(())


def test_what_stays_behind_is_noticed(modules, started, tmp_path):
    soak = modules[0]
    started.checked.update(soak.ESTIMATORS)
    started.change(tmp_path)
    started.report()
    kept = [np.zeros(1)]
    started.change(tmp_path)
    with pytest.raises(soak.UnsoundError, match="number of live tensors changed"):
        started.report()
    kept.append(started.soaked.handler)
    with pytest.raises(soak.UnsoundError, match="old handler is still referred to"):
        started.change(tmp_path)


@pytest.mark.parametrize(("leak", "noticed"), [(0, False), (60, False), (120, True)])
def test_a_leak_of_one_array_a_step_is_noticed(modules, leak, noticed):
    """Over 100,000 steps, on memory that jumps about by megabytes and fills at first."""
    rng = np.random.default_rng(0)
    steps = np.arange(250, 100_001, 250)
    jumps = np.repeat(rng.normal(0, 1e5, len(steps) // 10), 10)
    size = 5e8 + 1e8 * (1 - np.exp(-steps / 3_000)) + jumps + leak * steps
    samples = list(zip(steps.tolist(), size.astype(int).tolist(), strict=True))
    slope = modules[2].slope(samples)
    assert slope.too_steep is noticed
    assert slope.conclusive
    assert modules[2].summary(samples, 2_500)["flat"] is not noticed


@pytest.mark.parametrize(("leak", "noticed"), [(0, False), (50, False), (80, True)])
def test_a_leak_is_noticed_between_jumps_that_each_handler_brings(modules, leak, noticed):
    rng = np.random.default_rng(0)
    steps = np.arange(50, 100_001, 50)
    handler = steps // 2_500
    jumps = np.cumsum(rng.normal(0, 2e7, handler.max() + 1))[handler]
    size = 9e8 + jumps + leak * steps + 4096 * rng.integers(0, 3, len(steps))
    samples = list(zip(steps.tolist(), size.astype(int).tolist(), strict=True))
    assert not modules[2].slope(samples).conclusive
    slope = modules[2].slope_of_handlers(samples, 2_500)
    assert slope.conclusive
    assert slope.too_steep is noticed
    assert modules[2].summary(samples, 2_500)["flat"] is not noticed
