"""How a loss reads in print: what it estimates, and of its other options those that are set."""

from typing import Any

from negcache_core.arrays.words import number_of

OPTIONS = (
    *("num_samples", "top_k", "id_keys", "group_key", "margin", "log_frequency_key"),
    *("staleness_correction", "retrieval_fn", "score_transform", "group"),
)


def loss_in_words(loss: Any) -> str:
    """Return the options of a loss; of a loss of another kind its type's name alone."""
    if not hasattr(loss, "estimator"):
        return type(loss).__name__
    batch = " with in-batch negatives" if loss.in_batch_negatives else ""
    scale = loss.scale() if callable(loss.scale) else loss.scale
    value = None if scale is None else number_of(scale)
    trained = "" if isinstance(loss.scale, (int, float)) else ", given by a function or a tensor"
    said = "no scale" if scale is None else f"scale {'?' if value is None else f'{value:.4g}'}"
    words = [f"estimator {loss.estimator}{batch}", said + (trained if scale is not None else "")]
    for name in OPTIONS:
        option = getattr(loss, name, None)
        if option not in (None, False, (), 1):
            words.append(f"{name} {_named(option)}")
    return ", ".join(words)


def _named(option: Any) -> str:
    if isinstance(option, tuple):
        return " and ".join(map(str, option))
    known = isinstance(option, (bool, int, float, str))
    return str(option) if known else getattr(option, "__name__", type(option).__name__)
