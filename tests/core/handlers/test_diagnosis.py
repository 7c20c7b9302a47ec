"""What diagnose() says, by the figures it is given; and the one warning of a harmed training."""

import re
import warnings

import numpy as np
import pytest

import negcache_core as negcache
from negcache_core.handlers.diagnosis import FIRST_LOOK, HARMFUL_STALENESS

GOOD = {
    "staleness": 0.01,
    "mean_age_drawn": 5.0,
    "effective_negatives": 30.0,
    "positive_probability": 0.3,
    "fill": 1.0,
    "masked_count": 0.0,
    "nonfinite_count": 0.0,
}


def full_loss(written=128, **options):
    loss_fn = negcache.NegativeCacheLoss(128, {"x": np.zeros((1, 2))}, np.zeros((1, 2)), **options)
    loss_fn.cache.age[:written] = 0
    return loss_fn


def said(figures=None, **options):
    metrics = {name: np.asarray(value) for name, value in {**GOOD, **(figures or {})}.items()}
    return full_loss(**options).diagnose(metrics)


def test_a_sound_training_is_called_so_with_its_figures():
    assert said() == [
        "Nothing stands out: staleness 0.01, effective_negatives 30, positive_probability 0.3, "
        "fill 1."
    ]


@pytest.mark.parametrize(
    ("figures", "words"),
    [
        ({"staleness": 0.37}, r"staleness 0\.37 .* 5 steps old .* too old for this learning rate"),
        ({"staleness": 0.0}, r"staleness 0\.00 .* has not changed .* frozen"),
        ({"effective_negatives": 1.1}, r"effective_negatives 1\.1 of 128 rows: one row takes"),
        ({"effective_negatives": 127.0}, r"127 of 128 rows: scores hardly tell items apart"),
        ({"positive_probability": 0.99}, r"positive_probability 0\.99: .* teach little"),
        ({"masked_count": 4.0}, r"4 draws of a step found no row: no row may be a negative"),
        ({"masked_count": 4.0, "fill": 0.0}, r"4 draws .*: the cache was empty"),
        ({"nonfinite_count": 2.0}, r"overflows: 2 embeddings"),
    ],
)
def test_what_is_off_is_said_with_its_figure_and_nothing_else(figures, words):
    (sentence,) = said(figures)
    assert re.search(words, sentence)


def test_old_rows_are_advised_on_by_what_is_on_already():
    (plain,), (windowed,) = said({"staleness": 0.37}), said({"staleness": 0.37, "window": 9.0})
    assert plain.endswith("or set max_staleness.")
    assert windowed.endswith("or refresh() rows between steps.")
    (worse,) = said({"staleness": 0.7})
    assert "dropout" in plain
    assert "dropout" not in worse  # it does not explain that much


def test_a_cache_that_is_not_full_and_a_scale_that_ran_away_are_said():
    (sentence,) = said(written=32)
    assert sentence.startswith("32 of 128 slots are filled (25%)")
    (sentence,) = said(scale=lambda: 67.0)
    assert sentence.startswith("the trained scale is 67")


def test_without_a_step_it_says_so():
    assert full_loss().diagnose()[-1].startswith("No step's figures are known")


def train(loss_fn, steps, *, turns):
    """Run steps whose item tower is another in each, or stays the same."""
    rng = np.random.default_rng(0)
    for step in range(steps):
        x, sign = rng.standard_normal((4, 2)), (-1) ** step if turns else 1
        loss_fn(lambda features, sign=sign: features["x"] * sign, x, x * sign, {"x": x})


def test_a_harmed_training_is_warned_of_once():
    loss_fn = full_loss(written=0, generator=0)
    with pytest.warns(negcache.TrainingWarning, match="after 64 steps .* staleness") as caught:
        train(loss_fn, 4 * FIRST_LOOK, turns=True)
    assert loss_fn.metrics["staleness"] >= HARMFUL_STALENESS
    assert len(caught) == 1


def test_a_sound_training_is_not_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(full_loss(written=0, generator=0), 2 * FIRST_LOOK, turns=False)
