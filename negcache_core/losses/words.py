"""A loss as text: what it estimates, and which of its other options are set."""

from typing import Any

from negcache_core.arrays.words import number_of

OPTIONS = (
    *("num_samples", "top_k", "id_keys", "group_key", "margin", "log_frequency_key"),
    *("max_staleness", "staleness_correction", "retrieval_fn", "score_transform", "group"),
    *("matryoshka_dims", "matryoshka_weights", "fused"),
)
UNSAID = {"num_samples": 1, "id_keys": ()}
"""What these options are where nothing is asked for; of the others it is None or False."""


def loss_in_words(loss: Any) -> str:
    """Return the options of a loss; for another kind of loss, only the name of its type."""
    if not hasattr(loss, "estimator"):
        return type(loss).__name__
    batch = " with in-batch negatives" if loss.in_batch_negatives else ""
    value = scale_of(loss)
    trained = "" if isinstance(loss.scale, (int, float)) else ", given by a function or a tensor"
    said = f"scale {'?' if value is None else f'{value:.4g}'}{trained}"
    words = [f"estimator {loss.estimator}{batch}", "no scale" if loss.scale is None else said]
    for name in OPTIONS:
        option = getattr(loss, name, None)
        if option is not None and option is not False and option != UNSAID.get(name):
            words.append(f"{name} {_named(option)}")
    return ", ".join(words)


def scale_of(loss: Any) -> float | None:
    """Return the current scale; None if there is none, or if it cannot be read."""
    scale = loss.scale() if callable(loss.scale) else loss.scale
    owned = loss.backend.owns(scale)  # PyTorch warns if a number is read from a trained tensor
    return number_of(loss.backend.stop_gradient(scale) if owned else scale)


def _named(option: Any) -> str:
    if isinstance(option, tuple):
        return " and ".join(map(str, option))
    known = isinstance(option, (bool, int, float, str))
    return str(option) if known else getattr(option, "__name__", type(option).__name__)
