"""The candidates in TensorFlow, each one tf.function."""

import functools
from collections.abc import Callable
from typing import Any

import negcache_tensorflow as negcache
import tensorflow as tf
from _harness import copied_update, handler_of, result_of


class Candidates:
    """Makes each candidate on demand, by name: its methods return what to time."""

    def __init__(self, slots: int, width: int, rows: int, vocabulary: int) -> None:
        tf.random.set_seed(0)
        self.slots, self.width = slots, width
        self.embedding = tf.Variable(tf.random.normal((vocabulary, width)) / width**0.5)
        self.query = tf.Variable(tf.random.normal((rows, width)))
        self.features = {"id": tf.random.uniform((rows,), 0, vocabulary, tf.int64)}
        self.all_ids = tf.range(slots, dtype=tf.int64) % vocabulary

    def network(self, features: dict[str, tf.Tensor]) -> tf.Tensor:
        """Look embeddings up."""
        return tf.gather(self.embedding, features["id"])

    def full_handler(self, dtype: tf.DType) -> negcache.CacheLossHandler:
        """Return a handler with a full cache."""
        handler = handler_of(negcache, self.slots, self.width, tf.int64, dtype)
        rows = tf.gather(tf.cast(self.embedding, dtype), self.all_ids)
        handler.cache.data["id"].assign(self.all_ids)
        handler.cache.data["embedding"].assign(rows)
        handler.cache.age.assign(tf.range(self.slots))
        return handler

    @functools.cached_property
    def handler(self) -> negcache.CacheLossHandler:
        """The handler of float32 rows, shared by candidates."""
        return self.full_handler(tf.float32)

    @functools.cached_property
    def table(self) -> tf.Variable:
        """Rows that are never written in place: reading such a variable would copy all of it."""
        return tf.Variable(tf.gather(self.embedding, self.all_ids), trainable=False)

    @functools.cached_property
    def to_commit(self) -> tuple[Any, ...]:
        """What one step commits."""
        given = (self.network(self.features), self.features)
        queries = tf.convert_to_tensor(self.query)
        return result_of(self.handler, self.network, queries, *given), *given

    def product(self) -> Callable[[], Any]:
        """Multiply queries and cache."""
        table = self.table
        return _finished(tf.function(lambda: tf.matmul(self.query, table, transpose_b=True)))

    def step(self, handler: Any = None) -> Callable[[], Any]:
        """Take a whole step."""
        handler = handler or self.handler

        @tf.function
        def step() -> Any:
            with tf.GradientTape() as tape:
                query, positive = tf.convert_to_tensor(self.query), self.network(self.features)
                loss = handler.update_cache_and_compute_loss(
                    self.network, query, positive, self.features
                )
            return loss, tape.gradient(loss, [self.query])

        return _finished(step)

    def bfloat16_step(self) -> Callable[[], Any]:
        """Take the same on bfloat16 rows."""
        return self.step(self.full_handler(tf.bfloat16))

    def float16_step(self) -> Callable[[], Any]:
        """Take the same on float16 rows."""
        return self.step(self.full_handler(tf.float16))

    def update(self) -> Callable[[], Any]:
        """Write a step's rows in place."""
        handler, arguments = self.handler, self.to_commit
        return _finished(tf.function(lambda: handler.commit(*arguments)))

    def copying_update(self) -> Callable[[], Any]:
        """Write a step's rows into a copy."""
        handler, arguments = self.handler, self.to_commit
        return _finished(tf.function(lambda: copied_update(handler, *arguments)))

    def published(self) -> Callable[[], Any]:
        """Take a step of the published algorithm."""
        ids, query, embedding = self.features["id"], self.query, self.embedding
        features, table = tf.Variable(self.all_ids, trainable=False), self.table

        @tf.function
        def published() -> Any:
            with tf.GradientTape() as tape:
                scores = tf.matmul(tf.stop_gradient(query), table, transpose_b=True)
                noise = -tf.math.log(-tf.math.log(tf.random.uniform(tf.shape(scores))))
                drawn = tf.argmax(scores + noise, axis=1)
                positive = tf.gather(embedding, ids)
                negative = tf.gather(embedding, tf.gather(features, drawn))
                positive_score = tf.reduce_sum(query * positive, 1)
                every = tf.concat([tf.stop_gradient(positive_score)[:, None], scores], 1)
                miss = 1 - tf.nn.softmax(every)[:, 0]
                loss = tf.reduce_mean(miss * (tf.reduce_sum(query * negative, 1) - positive_score))
            table.assign(tf.tensor_scatter_nd_update(table, drawn[:, None], negative))
            features.assign(tf.tensor_scatter_nd_update(features, drawn[:, None], ids))
            return loss, tape.gradient(loss, [query])

        return _finished(published)


def _finished(function: Callable[[], Any]) -> Callable[[], Any]:
    """Return a function that waits for the results by reading one row of each."""
    return lambda: [each[:1].numpy() for each in tf.nest.flatten(function()) if _has_rows(each)]


def _has_rows(value: Any) -> bool:
    return value is not None and value.shape.rank > 0
