"""What every backend of the soak runs: items, towers, batches, and alternating options."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

SLOTS, INPUTS, WIDTH, ROWS, ITEMS = 256, 6, 8, 16, 512
SCALE = 2.0
RATE, DECAY = 0.05, 0.999  # the towers learn, and stay bounded
REFRESHED = (8, 64)
DATA_KEYS = ("x", "serial")
FIELDS = {
    "x": ((INPUTS,), "float64"),
    "serial": ((), "int64"),
    "id": ((), "int64"),
    "log_frequency": ((), "float64"),
    "embedding": ((WIDTH,), "float64"),
}
Arrays = dict[str, Any]


class Turn(NamedTuple):
    """The options of one handler: of its loss, of its manager, and whether known items stay out."""

    loss: dict[str, Any]
    manager: Mapping[str, Any] = MappingProxyType({})
    known_stay_out: bool = False

    @property
    def draws(self) -> int:
        """Draws per query."""
        return self.loss.get("num_samples", 1)

    @property
    def estimator(self) -> str:
        """The estimator's name."""
        return self.loss.get("estimator", "paper")


TURNS = (
    Turn({}),
    Turn({"estimator": "exact_query", "in_batch_negatives": True}, {"unique_key": "id"}),
    Turn({"estimator": "shared", "num_samples": 2}, {"use_lru": False}),
    Turn({"id_key": "id", "log_frequency_key": "log_frequency"}, {"unique_key": "id"}),
    Turn({"top_k": 16, "estimator": "shared"}, known_stay_out=True),
    Turn({"retrieval_fn": "hardest"}),
    Turn({"estimator": "exact_query", "staleness_correction": True, "num_samples": 3}),
)


def handler_of(negcache: Any, turn: Turn, seed: int) -> Any:
    """Return a new handler of any adapter. Items with a negative serial are masked: they stay out.

    The serial identifies rows, so the network's input shows which rows were drawn.
    """
    options = dict(turn.loss)
    if "retrieval_fn" in options:
        options["retrieval_fn"] = negcache.MaxScoreRetrievalFn()
    if negcache.__name__ != "negcache_jax":  # if the state holds the key
        options["generator"] = seed
    known = negcache.IsInCacheFilterFn(("id",))

    def enters(cache: Any, items: Arrays) -> Any:
        unmasked = items["serial"] >= 0
        return unmasked & known(cache, items) if turn.known_stay_out else unmasked

    specs = {key: negcache.FieldSpec(*spec) for key, spec in FIELDS.items()}
    return negcache.CacheLossHandler(
        negcache.CacheManager(specs, SLOTS, **turn.manager),
        negcache.CacheClassificationLoss("embedding", DATA_KEYS, scale=SCALE, **options),
        embedding_key="embedding",
        data_keys=DATA_KEYS,
        new_items_filter=enters,
    )


class Batch(NamedTuple):
    """One step's input: B rows, some of which may only be there to be masked.

    y:       (B, INPUTS) of the queries; features: of the positives, by field
    weight:  (B,) 0 or 1, the loss's sample_weight
    spoil:   (B,) and, for the draws, spoil_drawn (B, S): 0, or what makes an embedding not finite
    fails:   whether the item network raises
    """

    y: Any
    features: Arrays
    weight: Any
    spoil: Any
    spoil_drawn: Any
    fails: bool


def features_of_no_item(rows: int) -> Arrays:
    """Return features of positives with an id that no item has, so that every slot competes."""
    features = {
        key: np.zeros((rows, *shape), dtype)
        for key, (shape, dtype) in FIELDS.items()
        if key != "embedding"
    }
    return {**features, "id": np.full(rows, -1)}


class Stream:
    """Endless batches, and the items behind them; all from one seed."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.items = self.rng.standard_normal((ITEMS, INPUTS))
        self.log_frequency = 0.3 * self.rng.standard_normal(ITEMS)
        self.serial = 0

    def towers(self) -> Arrays:
        """Return the towers' initial weights."""
        shape = (INPUTS, WIDTH)
        return {name: self.rng.standard_normal(shape) / INPUTS**0.5 for name in ("query", "item")}

    def batch(self, draws: int, sizes: tuple[int, ...] | None) -> Batch:
        """Return a batch of 0 to ROWS rows; masked rows fill it up to one of `sizes`, if given."""
        rng, rows = self.rng, int(self.rng.integers(0, ROWS + 1))
        size = rows if sizes is None else min(each for each in sizes if each >= rows)
        ids = rng.integers(0, ITEMS, size)
        serial = self.serial + 1 + np.arange(size)
        self.serial += size
        kept = np.arange(size) < rows
        if rng.random() < 0.5:
            kept &= rng.random(size) < 0.8
        return Batch(
            y=self.items[ids] + 0.3 * rng.standard_normal((size, INPUTS)),
            features={
                "x": self.items[ids],
                "serial": np.where(kept, serial, -serial),
                "id": ids,
                "log_frequency": self.log_frequency[ids],
            },
            weight=(kept & (rng.random(size) < 0.9)).astype(float),
            spoil=self.spoil(size),
            spoil_drawn=self.spoil(size * draws).reshape(size, draws),
            fails=rng.random() < 0.005,
        )

    def spoil(self, rows: int) -> Any:
        """Return zeros (rows,), occasionally with NaNs and infinities among them."""
        found = np.zeros(rows)
        if self.rng.random() < 0.02:
            hit = self.rng.random(rows) < 0.3
            found[hit] = self.rng.choice([np.nan, np.inf, -np.inf], hit.sum())
        return found
