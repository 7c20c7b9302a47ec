"""Nothing learns by accident: all items of a step carry a gradient, or none does.

Positives, drawn negatives and hard negatives are embedded by one network. Where some of them are
constants and others are not, a `no_grad` or a `detach` was left in by mistake, and the network
would only be pulled or only be pushed. A frozen item network (no item learns) and a frozen query
network are legitimate. They look the same as a mistake, so neither is refused.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from negcache_core.arrays.backend import Backend
from negcache_core.errors import KindError, OptionError
from negcache_core.losses.nonfinite import Embedded

WORDS = {
    "positives": "the positives",
    "negatives": "the drawn negatives",
    "hard_negatives": "the hard negatives",
}
"""The items of a step, as `constant` names them and as messages do."""


def check_constant(constant: Any) -> tuple[str, ...]:
    """Return the names of what may be constant; raise KindError or OptionError for others."""
    if isinstance(constant, str) or not isinstance(constant, Iterable):
        raise KindError(
            f"constant is {constant!r}: expected several names, such as ('positives',)."
        )
    names = tuple(constant)
    unknown = [name for name in names if name not in WORDS]
    if unknown:
        raise OptionError(f"constant has {unknown}: expected names among {list(WORDS)}.")
    return names


def learning_alike(embedded: Embedded, constant: Iterable[str], backend: Backend) -> Embedded:
    """Return the embeddings; raise OptionError, maybe only on differentiation, if they differ.

    constant: names of WORDS that are not checked, because they are meant to be constant

    Without rows, as on a replica whose part of the batch is empty, there is nothing to check.
    """
    left_out = check_constant(constant) if constant else ()
    names, arrays = [], []
    for name, rows in (
        ("positives", embedded.positives),
        ("negatives", embedded.drawn),
        ("hard_negatives", embedded.hard),
    ):
        if rows is not None and name not in left_out and rows.shape[0] != 0:
            names.append(name)
            arrays.append(rows)

    def check(learns: Sequence[bool | None]) -> None:
        learning = [name for name, each in zip(names, learns, strict=True) if each]
        constants = [name for name, each in zip(names, learns, strict=True) if each is False]
        if learning and constants:
            raise _mixed(constants, learning)

    found = dict(zip(names, backend.watch_gradients(arrays, check), strict=True))
    return embedded._replace(
        positives=found.get("positives", embedded.positives),
        drawn=found.get("negatives", embedded.drawn),
        hard=found.get("hard_negatives", embedded.hard),
    )


def _mixed(constants: Sequence[str], learning: Sequence[str]) -> OptionError:
    still, moving = (" and ".join(WORDS[name] for name in names) for names in (constants, learning))
    return OptionError(
        f"{still} carry no gradient, but {moving} do: the item network would learn from {moving} "
        "alone. Embed all items with the network that is trained, outside no_grad and without "
        f"detach or stop_gradient. If this is intended, pass constant={tuple(constants)!r}."
    )
