"""What a loss with its cache says of itself: in print, and by diagnose()."""

import negcache_torch
import numpy as np
import pytest
import torch

from negcache_core import NegativeCacheLoss

X = np.eye(4, dtype=np.float32)


def network(features):
    return features["x"]


def test_print_says_no_step_yet_only_of_an_empty_cache():
    """A compiled step keeps no metrics: where rows are written, there was one, or a prefill."""
    loss_fn = NegativeCacheLoss(8, {"x": X}, 4, generator=0)
    assert str(loss_fn).endswith("scale 20, max_staleness 0.2; no step yet)")
    loss_fn.prefill(network, {"x": X}, 4)
    assert str(loss_fn).endswith("max_staleness 0.2)")
    loss_fn(network, X, X, {"x": X})
    assert str(loss_fn).endswith("staleness 0.000, window 4 steps)")


def test_print_names_every_option_that_is_set():
    labels = {"id": np.arange(4), "query": np.arange(4), "group": np.arange(4)}
    plain = str(NegativeCacheLoss(8, {"x": X}, 4, labels=labels))
    assert not any(name in plain for name in ("id_keys", "group_key", "margin", "num_samples"))
    options = {"id_keys": ("id", "query"), "group_key": "group", "margin": 0.0, "num_samples": 2}
    said = str(NegativeCacheLoss(8, {"x": X}, 4, labels=labels, **options))
    assert (
        "num_samples 2, id_keys id and query, group_key group, margin 0.0, max_staleness 0.2;"
        in said
    )
    assert "margin 1.0" in str(NegativeCacheLoss(8, {"x": X}, 4, margin=1.0))


@pytest.mark.parametrize("trained", [False, True])
def test_a_trained_scale_is_read_without_a_warning(trained):
    """PyTorch warns where a number is read off a tensor with a gradient; a warning is an error."""
    scale = torch.nn.Parameter(torch.tensor(60.0), requires_grad=trained)
    for given in (scale, lambda: 1.0 * scale):
        loss_fn = negcache_torch.NegativeCacheLoss(8, {"x": torch.eye(4)}, 4, scale=given)
        assert "scale 60, given by a function or a tensor" in str(loss_fn)
        said = " ".join(loss_fn.diagnose({"staleness": 0.01}))
        assert "the trained scale is 60: it has run away" in said


@pytest.mark.parametrize(
    ("staleness", "sentence"),
    [
        (0.09, "Nothing stands out"),
        (0.1, "rows are too old for this learning rate"),
        (0.99, "rows are too old for this learning rate"),
        (1.0, "the item tower can hardly be the one that embedded these rows"),
    ],
)
def test_staleness_in_words(staleness, sentence):
    loss_fn = NegativeCacheLoss(4, {"x": X}, 4)
    loss_fn.prefill(network, {"x": X}, 4)
    (said,) = loss_fn.diagnose({"staleness": staleness, "mean_age_drawn": 3.0})
    assert sentence in said
    assert f"{staleness:.2f}" in said
