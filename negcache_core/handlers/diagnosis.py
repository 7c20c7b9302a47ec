"""What a handler's figures say about its training, in plain sentences."""

import logging
import warnings
from collections.abc import Mapping
from typing import Any

from negcache_core.arrays.words import fields_in_words, number_of
from negcache_core.cache.named import Caches
from negcache_core.cache.state import written_slots
from negcache_core.errors import TrainingWarning
from negcache_core.handlers.setup import Setup
from negcache_core.losses.words import loss_in_words, scale_of

logger = logging.getLogger(__name__)

HIGH_STALENESS = 0.1
HARMFUL_STALENESS = 0.5
STRANGE_STALENESS = 1.0
"""Two random directions have a staleness of 2: at a quarter of that rows mislead more than help, at
half of it they say almost nothing about these towers."""

FIRST_LOOK = 64
"""The first step at which figures are read for a warning; each later one is at twice as many."""

ENOUGH = 64
"""The number of rows from which on it matters how many of them compete."""

RUNAWAY_SCALE = 50.0


def describe(name: str, setup: Setup, caches: Caches | None, metrics: Mapping[str, Any]) -> str:
    """Return what `print(handler)` shows."""
    lines, fills = [], []
    for cache_name, manager in setup.managers.items():
        title = name if len(setup.managers) == 1 else f"{name} {cache_name!r}"
        filled = None if caches is None else written_slots([caches[cache_name].age])
        fills.append(filled)
        known = "" if filled is None else f", {filled:,} written"
        slots = manager.cache_size if caches is None else caches[cache_name].age.shape[0]
        whole = "" if slots == manager.cache_size else f" of {manager.cache_size:,}"
        fields = fields_in_words(manager.specs, slots)
        lines.append(f"{title}({slots:,}{whole} slots{known}, {fields};")
    stale = number_of(metrics.get("staleness"))
    known = "" if stale is None else f";\n  staleness {stale:.3f}"
    window = number_of(metrics.get("window"))
    if window is not None:
        known += f", window {window:,.0f} steps"
    if stale is None and all(filled == 0 for filled in fills):
        known = "; no step yet"  # if a slot is written, a compiled step kept no metrics
    lines.append(f"  {loss_in_words(setup.loss)}{known})")
    return "\n".join(lines)


def diagnose(setup: Setup, caches: Caches, metrics: Mapping[str, Any]) -> list[str]:
    """Return sentences about the cache and a step's metrics, each with its figures."""
    capacity = sum(int(cache.age.shape[0]) for cache in caches.values())
    filled = written_slots([cache.age for cache in caches.values()])
    found = {key: number_of(value) for key, value in metrics.items()}
    figures = {key: value for key, value in found.items() if value is not None}
    said = []
    if filled is not None and filled < capacity:
        said.append(
            f"{filled:,} of {capacity:,} slots are filled ({filled / capacity:.0%}): the loss "
            "rises while the cache fills. prefill() fills it at once."
        )
    if not figures:
        return [*said, "No step's figures are known yet, so there is nothing more to say."]
    said += _of_staleness(figures) + _of_scores(figures, filled or 0) + _of_scale(setup.loss)
    if figures.get("masked_count"):
        empty = not figures.get("fill")
        why = "the cache was empty." if empty else "no row may be a negative for their queries."
        said.append(f"{figures['masked_count']:.0f} draws of a step found no row: {why}")
    if figures.get("nonfinite_count"):
        count = figures["nonfinite_count"]
        said.append(
            f"a tower overflows: {count:.0f} embeddings of a step were left out because they are "
            "not finite."
        )
    return said or [_healthy(figures)]


def warn_of_harm(step: int, metrics: Mapping[str, Any]) -> bool:
    """Warn if the step's figures are clearly bad; return whether they were.

    Reads them only at steps 64, 128, 256, …, so that it seldom waits for a device.
    """
    if step < FIRST_LOOK or step & (step - 1):
        return False
    stale = number_of(metrics.get("staleness")) or 0.0
    if stale < HARMFUL_STALENESS:
        return False
    warnings.warn(
        f"after {step} steps of training the cache is doing harm: {_of_staleness(metrics)[0]} "
        "handler.diagnose() says more; this warning is not repeated.",
        TrainingWarning,
        stacklevel=2,
    )
    return True


def tell_of_nothing_learned(caches: Caches) -> None:
    """Log a message if a step without gradients meets an empty cache, which it leaves empty.

    Not a Python warning: where those are errors, an evaluation must not fail because of it.
    """
    if written_slots([cache.age for cache in caches.values()]) == 0:
        logger.warning(
            "A step was called without gradients, as under torch.no_grad(): it counts as an "
            "evaluation, and the cache stays empty. Pass training=True to fill it in such "
            "steps, or use prefill(); for evaluation call .eval(), or pass training=False."
        )


def _of_staleness(figures: Mapping[str, Any]) -> list[str]:
    stale, age = figures.get("staleness", 0.0), figures.get("mean_age_drawn", 0.0)
    measured = (
        f"staleness {stale:.2f} (|stale - fresh|^2 / |fresh|^2 of drawn rows, {age:.0f} steps old "
        "on average)"
    )
    if stale >= STRANGE_STALENESS:
        why = (
            "Was a checkpoint loaded into only one of the two, or is the learning rate far too "
            "high?"
        )
        return [f"{measured}: the item tower can hardly be the one that embedded these rows. {why}"]
    if stale >= HIGH_STALENESS:
        why = "rows are too old for this learning rate"
        if stale < HARMFUL_STALENESS:
            why += ", or dropout makes two embeddings of a row differ"
        advice = "Lower the rate, or refresh() rows between steps."
        if "window" not in figures:
            advice = "Lower the rate, refresh() rows between steps, or set max_staleness."
        return [f"{measured}: {why}. {advice}"]
    if stale == 0.0 and age >= 1.0:
        why = "Is it frozen, or left out of the optimizer?"
        return [f"{measured}: the item tower has not changed since its rows were cached. {why}"]
    return []


def _of_scores(figures: Mapping[str, float], filled: int) -> list[str]:
    if filled < ENOUGH:
        return []
    said = []
    compete = figures.get("effective_negatives", 0.0)
    positive = figures.get("positive_probability", 0.0)
    measured = f"effective_negatives {compete:.3g} of {filled:,} rows"
    if 0.0 < compete < 1.5:
        why = "The scale is too high, embeddings have collapsed, or the positive itself is in the "
        why += "cache: name its id in id_keys."
        said.append(f"{measured}: one row takes nearly all of a query's draws. {why}")
    if compete > 0.9 * filled:
        why = "The towers have learned nothing yet, or the scale is too low."
        said.append(f"{measured}: scores hardly tell items apart. {why}")
    if positive > 0.95:
        why = "Make the cache larger, or check whether the features give the positive away."
        said.append(f"positive_probability {positive:.2f}: these negatives teach little. {why}")
    return said


def _of_scale(loss: Any) -> list[str]:
    scale = getattr(loss, "scale", None)
    if scale is None or isinstance(scale, (int, float)):
        return []
    value = scale_of(loss)
    if value is None or value < RUNAWAY_SCALE:
        return []
    advice = "Fix it: 20 suits embeddings of length 1."
    return [f"the trained scale is {value:.0f}: it has run away, and the towers overfit. {advice}"]


def _healthy(figures: Mapping[str, float]) -> str:
    names = ("staleness", "effective_negatives", "positive_probability", "fill")
    listed = ", ".join(f"{name} {figures[name]:.3g}" for name in names if name in figures)
    return f"Nothing stands out: {listed}."
