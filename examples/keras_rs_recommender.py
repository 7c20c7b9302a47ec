"""Recommend names to Python functions with KerasRS: its negatives, a cache, and the full softmax.

    KERAS_BACKEND=jax python examples/keras_rs_recommender.py
    KERAS_BACKEND=tensorflow python examples/keras_rs_recommender.py --methods in-batch cache

The "users" are functions of installed packages, the "items" the names that they use: see
used_names.py. The task is to find one name of each held-out function from its other names. Each
method runs at each rate with the first seed; the rate with the best recall@10 on validation users
then runs with the other seeds, and recall is reported on test users. Finished runs are stored in
--results, and not repeated.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import keras_rs
import numpy as np
from keras import ops
from negcache_keras import CacheLayer, NegativeCacheLoss
from recall_report import best, picture, reported, table
from used_names import BUCKETS, KNOWN, WORDS, Interactions, Users, mine

WIDTH = 64
SCALE = 20.0
DROPPED = 0.5  # share of a user's known items that a training step drops
TINY = 1e-6  # smallest weight: in JAX, UnitNormalization of a zero mean has a NaN gradient
HARD = 32  # negatives of a batch that HardNegativeMining keeps
MOST = 20  # items recommended
METHODS = {
    "in-batch, KerasRS 0.4": "in-batch negatives, KerasRS's own RemoveAccidentalHits",
    "in-batch": "the same, with accidental hits masked",
    "hard negatives": f"the {HARD} of these with the highest scores",
    "cache": "everything in a negative cache",
    "full softmax": "all items, embedded at each step",
}

Features = Mapping[str, Any]


class WithoutAccidentalHits(keras_rs.layers.RemoveAccidentalHits):
    """KerasRS's layer, but it does remove hits: KerasRS 0.4 adds 1e-40, which float32 rounds away.

    See https://github.com/keras-team/keras-rs/pull/206.
    """

    def call(self, logits: Any, labels: Any, candidate_ids: Any) -> Any:
        """Return logits (B, B), with -1e9 for the other pairs with a query's own item."""
        same = ops.equal(candidate_ids[:, None], candidate_ids[None, :])
        return ops.where(ops.logical_and(same, labels == 0), -1e9, logits)


class TwoTower(keras.Model):
    """A tower for users, one for items, and the loss of one of METHODS."""

    def __init__(self, data: Interactions, method: str, cache_size: int, seed: int) -> None:
        super().__init__()
        layers, count = keras.layers, len(data.names)
        self.method = method
        self.catalogue = {key: data.items[key] for key in ("item", "words")}
        self.known = keras_rs.layers.EmbedReduce(count, WIDTH, combiner="mean")
        self.dropped = layers.Dropout(DROPPED)
        self.own = layers.Embedding(count, WIDTH)
        self.words = keras_rs.layers.EmbedReduce(BUCKETS, WIDTH, combiner="mean")
        self.user_layers, self.item_layers = Residual(), Residual()
        self.corrected = keras_rs.layers.SamplingProbabilityCorrection()
        self.without_hits = (
            keras_rs.layers.RemoveAccidentalHits()
            if method == "in-batch, KerasRS 0.4"
            else WithoutAccidentalHits()
        )
        self.hard = keras_rs.layers.HardNegativeMining(HARD)
        self.cache = None
        if method == "cache":
            self.cache = CacheLayer(
                NegativeCacheLoss(
                    cache_size,
                    features={key: array[:1] for key, array in self.catalogue.items()},
                    embedding=WIDTH,
                    scale=SCALE,
                    id_keys=("item",),
                    # Each item counts once: a batch contains popular ones several times.
                    unique_key="item",
                    in_batch_negatives=False,
                    generator=seed,
                )
            )

    def build(self, input_shape: Any) -> None:
        """Create the weights of the towers."""
        del input_shape
        self.known.build((None, KNOWN))
        self.own.build((None,))
        self.words.build((None, WORDS))
        self.user_layers.build((None, WIDTH))
        self.item_layers.build((None, WIDTH))

    def user_network(self, known: Any, training: bool = False) -> Any:
        """Return embeddings (n, WIDTH) of users, from the numbers (n, KNOWN) of their items."""
        weights = self.dropped(weights_of(known), training=training)
        return self.user_layers(self.known(known, weights=ops.maximum(weights, TINY)))

    def item_network(self, features: Features) -> Any:
        """Return embeddings (n, WIDTH) of items, from their features item and words."""
        named = self.words(features["words"], weights=weights_of(features["words"]))
        return self.item_layers(self.own(features["item"]) + named)

    def call(self, x: Mapping[str, Any], training: bool = False) -> tuple[Any, Any]:
        """Return the embeddings of users and of the items to find."""
        return self.user_network(x["known"], training), self.item_network(x["item"])

    def compute_loss(  # called by Keras's own train_step
        self,
        x: Mapping[str, Any],
        y: None,
        y_pred: tuple[Any, Any],
        sample_weight: Any = None,
        training: bool = True,
    ) -> Any:
        """Return the cross-entropy of each user's item against the method's negatives."""
        del y, sample_weight
        users, items = y_pred
        features = {key: x["item"][key] for key in self.catalogue}
        log_q = x["item"]["log_q"]
        if self.cache is not None:
            return self.cache.compute_loss(
                self.item_network, users, items, features, training=training
            )
        if self.method == "full softmax":
            every = self.item_network(self.catalogue)
            logits = SCALE * ops.matmul(users, ops.transpose(every))
            answers = features["item"]
            losses = keras.losses.sparse_categorical_crossentropy(answers, logits, from_logits=True)
            return ops.mean(losses)
        logits = SCALE * ops.matmul(users, ops.transpose(items))
        labels = ops.eye(ops.shape(logits)[0])
        logits = self.corrected(logits, ops.exp(log_q)[None, :])
        logits = self.without_hits(logits, labels, features["item"])
        if self.method == "hard negatives":
            logits, labels = self.hard(logits, labels)
        return ops.mean(keras.losses.categorical_crossentropy(labels, logits, from_logits=True))


class Recall(keras.callbacks.Callback):
    """Add recall@10 and @20 on validation and test users to the metrics of each epoch.

    An item that a user is known to have is not recommended.
    """

    def __init__(self, data: Interactions) -> None:
        super().__init__()
        self.data = data
        self.search: keras_rs.layers.BruteForceRetrieval | None = None

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Search the items with their current embeddings."""
        del epoch
        items = self.model.item_network(self.model.catalogue)[1:]  # item 0 is padding
        if self.search is None:
            numbers = self.data.items["item"][1:]
            most = min(MOST + KNOWN, len(numbers))
            self.search = keras_rs.layers.BruteForceRetrieval(items, numbers, k=most)
        else:
            self.search.update_candidates(items)
        for part in ("validation", "test"):
            for cutoff, value in self.of(getattr(self.data, part)).items():
                (logs if logs is not None else {})[f"{part}_recall@{cutoff}"] = value

    def of(self, users: Users) -> dict[int, float]:
        """Return recall at 10 and at MOST, by cutoff."""
        metrics = {k: keras_rs.metrics.RecallAtK(k=k) for k in (10, MOST)}
        for start in range(0, len(users.answer), 512):
            known, answer = (part[start : start + 512] for part in users)
            scores, found = self.search(self.model.user_network(known))
            found = ops.convert_to_numpy(found)
            new = ~(found[:, :, None] == known[:, None, :]).any(axis=2)
            right = {"labels": (found == answer[:, None]).astype("float32"), "mask": new}
            for metric in metrics.values():
                metric.update_state(right, scores)
        return {k: float(metric.result()) for k, metric in metrics.items()}


def weights_of(numbers: Any) -> Any:
    """Return 1 for each item number, and TINY for 0, which is padding."""
    return ops.maximum(ops.cast(numbers > 0, "float32"), TINY)


class Residual(keras.layers.Layer):
    """x + dense(x), normalized to length 1: so each step moves the embeddings of all items."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = keras.layers.Dense(WIDTH, activation="gelu")
        self.normalize = keras.layers.UnitNormalization()

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Create the weights."""
        self.dense.build(input_shape)

    def call(self, x: Any) -> Any:
        """Return (n, WIDTH)."""
        return self.normalize(x + self.dense(x))


def train(
    data: Interactions, method: str, rate: float, seed: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Train once; return the run's settings, its metrics after each epoch, and processor seconds.

    The rate falls to zero along half a cosine. Initial weights and the order of users depend on
    the seed alone, not on the method.
    """
    keras.utils.set_random_seed(seed)
    model = TwoTower(data, method, options.cache_size, seed)
    x = rows_of(data, options.batch_size)
    steps = len(x["known"]) // options.batch_size * options.epochs
    model.compile(keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(rate, steps)))
    used = time.process_time()
    history = model.fit(
        x,
        batch_size=options.batch_size,
        epochs=options.epochs,
        callbacks=[Recall(data)],
        verbose=options.verbose,
    ).history
    return {
        **name_of(method, rate, seed, options),
        "seconds": round(time.process_time() - used, 1),
        "curve": {key: [round(value, 5) for value in values] for key, values in history.items()},
    }


def rows_of(data: Interactions, batch_size: int) -> dict[str, Any]:
    """Return training rows {"known": …, "item": features}, cut to whole batches."""
    known, answer = data.train
    kept = len(answer) // batch_size * batch_size
    if not kept:
        raise SystemExit(f"{len(answer)} rows are less than a batch of {batch_size}.")
    rows = np.random.default_rng(0).permutation(len(answer))[:kept]
    return {
        "known": known[rows],
        "item": {key: value[answer[rows]] for key, value in data.items.items()},
    }


def name_of(method: str, rate: float, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that identify a run."""
    names = ("batch_size", "cache_size", "epochs", "max_users")
    given = {name: getattr(options, name) for name in names}
    return {
        "backend": keras.backend.backend(),
        "method": method,
        "rate": rate,
        "seed": seed,
        **given,
    }


def compare(data: Interactions, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the runs of each method at its best rate, one per seed."""
    kept = []
    if options.results is not None and options.results.exists():
        kept = [json.loads(line) for line in options.results.read_text().splitlines()]

    def run(method: str, rate: float, seed: int) -> dict[str, Any]:
        name = name_of(method, rate, seed, options)
        for row in kept:
            if name.items() <= row.items():
                return row
        print(f"{method}, rate {rate:g}, seed {seed}")
        row = train(data, method, rate, seed, options)
        if options.results is not None:
            with options.results.open("a") as file:
                file.write(json.dumps(row) + "\n")
        return row

    rows = []
    for method in options.methods:
        first, *others = options.seeds
        tried = [run(method, rate, first) for rate in options.rates]
        rate = best(tried)["rate"]
        rows += [*tried, *(run(method, rate, seed) for seed in others)]
    return reported(rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Mine, train, print the table and save the picture."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", maxsplit=1)[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rates", nargs="+", type=float, default=[0.003, 0.01, 0.03])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--cache-size", type=int, default=2_048)
    parser.add_argument("--max-users", type=int, help="stop mining at this many functions")
    parser.add_argument("--results", type=Path, help="a file that each run is appended to")
    parser.add_argument("--picture", type=Path, default=Path("keras_rs_recall.png"))
    parser.add_argument("--verbose", type=int, default=1, help="of Keras's fit: 1 shows a bar")
    options = parser.parse_args(arguments)

    data = mine(options.max_users)
    print(f"{len(data.train.answer)} training rows, {len(data.names) - 1} items")
    rows = compare(data, options)
    print(table(rows))
    picture(rows).savefig(options.picture)
    print("written to", options.picture)


if __name__ == "__main__":
    main()
