"""Recommend modules to Python files: a two-tower model, trained by Keras's `fit` against a cache.

    python examples/keras_recommender.py
    KERAS_BACKEND=jax python examples/keras_recommender.py --epochs 2 --max-files 500

The "users" are the Python files of the standard library and of NumPy, Keras, TensorFlow, JAX and
PyTorch, where these are installed; the "items" are the modules that they import. Nothing is
downloaded. One import of each file is held out, and its other imports are known. Recall@10 is the
share of files whose held-out import is among the ten modules recommended, excluding known imports.
The data is real, and so is the popularity (a few modules are everywhere), but no person chose
anything: the results say nothing about your shop.

It trains twice for the same number of steps: with in-batch negatives, and against a cache.
"""

import argparse
import math
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
from curves import Panel, draw
from installed_source import source_files
from keras import ops
from negcache_keras import CacheLayer, FieldSpec, NegativeCacheLoss

KNOWN = 24  # the most imports in a file's query
WORDS, BUCKETS = 8, 4_096  # words of a module's dotted name, hashed
WIDTH = 64
SCALE = 20.0
_IMPORT = re.compile(r"^[ \t]*(?:from|import)[ \t]+([A-Za-z_][\w.]*)", re.MULTILINE)
_PACKAGES = ("numpy", "keras", "tensorflow", "jax", "torch")

Features = Mapping[str, Any]


class Imports(NamedTuple):
    """Files and the modules that they import. Module number 0 means none, and pads rows.

    modules:  names, by number
    known:    int32 (files, KNOWN), the imports that a file's query may contain
    held_out: int32 (files,), the import that is not in its row of `known`
    features: field -> (modules, …): item_id, words, and log_q, the log of a module's share of
              imports
    """

    modules: list[str]
    known: np.ndarray
    held_out: np.ndarray
    features: dict[str, np.ndarray]


def mine(max_files: int | None = None) -> Imports:
    """Read the imports of installed files: the first module of each line, no relative imports.

    Files with fewer than 4 imports are skipped, and so are modules that only one file imports.
    """
    files = []
    for found in _imports_of_files():
        if len(found) >= 4:
            files.append(found)
        if len(files) == max_files:
            break
    counts = Counter(name for found in files for name in found)
    modules = ["", *sorted(name for name, count in counts.items() if count > 1)]
    numbers = {name: number for number, name in enumerate(modules)}
    kept = [[numbers[name] for name in sorted(found) if name in numbers] for found in files]
    # One is held out, and one of the others is to be found from the rest.
    kept = [ids for ids in kept if len(ids) > 2]
    known, held_out = np.zeros((len(kept), KNOWN), np.int32), np.zeros(len(kept), np.int32)
    for row, ids in enumerate(kept):
        held_out[row] = ids.pop(row % len(ids))
        known[row, : len(ids[:KNOWN])] = ids[:KNOWN]
    trained = np.bincount(known.reshape(-1), minlength=len(modules))
    words = np.zeros((len(modules), WORDS), np.int32)
    for number, name in enumerate(modules):
        hashed = [_hash(word) % (BUCKETS - 1) + 1 for word in re.findall(r"[^\W_]+", name)]
        words[number, : len(hashed[:WORDS])] = hashed[:WORDS]
    share = np.maximum(trained, 1) / trained[1:].sum()
    features = {
        "item_id": np.arange(len(modules), dtype=np.int32),
        "words": words,
        "log_q": np.log(share).astype(np.float32),
    }
    return Imports(modules, known, held_out, features)


class Pairs(keras.utils.PyDataset):
    """Batches {"known": (B, KNOWN), "item": features}, shuffled in each epoch."""

    def __init__(self, rows: Mapping[str, Any], batch_size: int) -> None:
        super().__init__()
        self.rows, self.batch_size = rows, batch_size
        self.random = np.random.default_rng(0)
        self.on_epoch_end()

    def on_epoch_end(self) -> None:
        """Shuffle."""
        self.order = self.random.permutation(len(self.rows["known"]))

    def __len__(self) -> int:
        return math.ceil(len(self.order) / self.batch_size)

    def __getitem__(self, batch: int) -> tuple[dict[str, Any]]:
        chosen = self.order[batch * self.batch_size :][: self.batch_size]
        item = {key: value[chosen] for key, value in self.rows["item"].items()}
        return ({"known": self.rows["known"][chosen], "item": item},)


def pairs_of(data: Imports) -> dict[str, Any]:
    """Return rows {"known": (n, KNOWN), "item": features}: each known import and the others."""
    files, places = np.nonzero(data.known)
    item = data.known[files, places]
    known = data.known[files]
    known[np.arange(len(files)), places] = 0
    return {"known": known, "item": {key: value[item] for key, value in data.features.items()}}


@keras.saving.register_keras_serializable("negcache")
class TwoTower(keras.Model):
    """A tower for files, one for modules, and a loss between them.

    modules:    the number of modules, including the one that means none
    cache_size: slots of the cache; 0 for in-batch negatives only
    """

    def __init__(self, modules: int, cache_size: int, **options: Any) -> None:
        super().__init__(**options)
        layers = keras.layers
        self.file_tower = keras.Sequential(
            [
                layers.Embedding(modules, WIDTH, mask_zero=True),
                layers.GlobalAveragePooling1D(),
                layers.Dense(WIDTH),
                layers.UnitNormalization(),
            ]
        )
        self.module_embedding = layers.Embedding(modules, WIDTH)
        self.word_tower = keras.Sequential(
            [layers.Embedding(BUCKETS, WIDTH, mask_zero=True), layers.GlobalAveragePooling1D()]
        )
        self.normalize = layers.UnitNormalization()
        self.cache_size = cache_size
        self.cache = CacheLayer(make_loss(cache_size)) if cache_size else None

    def item_network(self, features: Features) -> Any:
        """Return embeddings (n, WIDTH) of modules, from their features item_id and words."""
        own = self.module_embedding(features["item_id"])
        return self.normalize(own + self.word_tower(features["words"]))

    def call(self, x: Mapping[str, Any]) -> tuple[Any, Any]:
        """Return the embeddings of files and of their modules."""
        return self.file_tower(x["known"]), self.item_network(x["item"])

    def compute_loss(  # called by Keras's own train_step and test_step
        self,
        x: Mapping[str, Any],
        y: None,
        y_pred: tuple[Any, Any],
        sample_weight: Any = None,
        training: bool = True,
    ) -> Any:
        """Return the loss of a batch; in training, update the cache."""
        del y, sample_weight
        # The file's other imports are not wrong answers; its own module replaces padding.
        own = x["item"]["item_id"][:, None]
        ids = ops.concatenate([own, ops.where(x["known"] > 0, x["known"], own)], axis=1)
        item = dict(x["item"])
        # Popular modules are there many times: the log of the number of rows to expect of each.
        rows = self.cache_size + ops.shape(own)[0]
        log_rows = item.pop("log_q") + ops.log(ops.cast(rows, "float32"))
        if self.cache is None:
            return in_batch_loss(*y_pred, ids, item["item_id"], log_rows)
        return self.cache.compute_loss(
            self.item_network,
            *y_pred,
            item,
            labels={"log_rows": log_rows},
            training=training,
            positive_ids=ids,
        )


def make_loss(cache_size: int) -> NegativeCacheLoss:
    """Return a loss with a cache of modules: their features, embedding and popularity."""
    number = FieldSpec((), "int32")
    return NegativeCacheLoss(
        cache_size,
        features={"item_id": number, "words": FieldSpec((WORDS,), "int32")},
        embedding=FieldSpec((WIDTH,), "bfloat16"),
        scale=SCALE,
        labels={"log_rows": FieldSpec((), "float32")},
        id_keys=("item_id",),
        log_frequency_key="log_rows",
        generator=0,
    )


def in_batch_loss(query: Any, item: Any, ids: Any, item_ids: Any, log_rows: Any) -> Any:
    """Return the same cross-entropy with the same corrections, over the batch's items only."""
    scores = SCALE * ops.matmul(query, ops.transpose(item))
    diagonal = ops.eye(ops.shape(scores)[0], dtype="bool")
    right = ops.any(ids[:, :, None] == item_ids, axis=1)
    others = ops.where(right, -np.inf, scores - log_rows)
    logits = ops.where(diagonal, scores, others)
    return ops.mean(ops.logsumexp(logits, axis=1) - ops.diagonal(scores))


def recall_at_10(scores: np.ndarray, data: Imports) -> float:
    """Return the share of files whose held-out import is among their ten highest `scores`."""
    scores = np.array(np.broadcast_to(scores, (len(data.known), len(data.modules))))
    scores[:, 0] = -np.inf
    np.put_along_axis(scores, data.known, -np.inf, axis=1)  # already known
    own = np.take_along_axis(scores, data.held_out[:, None], axis=1)
    return float(((scores <= own).sum(axis=1) > len(data.modules) - 10).mean())


def scores_of(model: TwoTower, data: Imports) -> np.ndarray:
    """Return the scores (files, modules) of all pairs."""
    items = model.item_network({key: data.features[key] for key in ("item_id", "words")})
    files = model.file_tower(data.known)
    return np.asarray(ops.convert_to_numpy(ops.matmul(files, ops.transpose(items))))


class Recall(keras.callbacks.Callback):
    """Record recall@10 after each epoch in `curve`."""

    def __init__(self, data: Imports, curve: dict[int, float]) -> None:
        super().__init__()
        self.data, self.curve = data, curve

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Evaluate; `logs` are not used."""
        del logs
        self.curve[epoch + 1] = recall_at_10(scores_of(self.model, self.data), self.data)


def _imports_of_files() -> Iterator[set[str]]:
    for path, _ in source_files(_PACKAGES, ("site-packages",)):
        yield set(_IMPORT.findall(path.read_text(encoding="utf-8", errors="replace")))


def _hash(text: str) -> int:
    return zlib.crc32(text.encode())  # the same in every process, unlike hash()


def main(arguments: Sequence[str] | None = None) -> None:
    """Mine, train without and with a cache, and print the recall of each."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", maxsplit=1)[0])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--cache-size", type=int, default=4_096)
    parser.add_argument("--max-files", type=int, help="read at most this many files")
    parser.add_argument("--learning-rate", type=float, default=0.003)
    parser.add_argument("--out", type=Path, help="a folder for weights, TensorBoard and a picture")
    options = parser.parse_args(arguments)

    data = mine(options.max_files)
    print(f"{len(data.known)} files, {len(data.modules) - 1} modules")
    print(f"recall@10, the most popular modules: {recall_at_10(data.features['log_q'], data):.3f}")
    progress = 1 if sys.stdout.isatty() else 2  # a bar, or a line for each epoch
    curves: dict[str, dict[int, float]] = {}
    for name, cache_size in (("in-batch negatives", 0), ("with a cache", options.cache_size)):
        keras.utils.set_random_seed(0)
        model = TwoTower(len(data.modules), cache_size)
        model.compile(keras.optimizers.Adam(options.learning_rate))
        curve = curves[name] = {}
        callbacks = [Recall(data, curve)]
        if options.out is not None and cache_size:  # the weights include the cache
            weights = str(options.out / "model.weights.h5")
            callbacks += [
                keras.callbacks.ModelCheckpoint(weights, save_weights_only=True),
                keras.callbacks.TensorBoard(options.out / "tensorboard"),
            ]
        batches = Pairs(pairs_of(data), options.batch_size)
        model.fit(
            batches, epochs=options.epochs, verbose=progress, shuffle=False, callbacks=callbacks
        )
        print(f"recall@10, {name}: {curve[options.epochs]:.3f}")
    if options.out is not None:
        lines = {name: (list(curve), list(curve.values())) for name, curve in curves.items()}
        title = f"recall@10: {len(data.known):,} files, {len(data.modules) - 1:,} modules"
        draw([Panel(title, lines, x="epoch")], options.out / "recall.svg")


if __name__ == "__main__":
    main()
