"""The candidates in TensorFlow, each one tf.function."""

import functools
from collections.abc import Callable
from typing import Any

import negcache_tensorflow as negcache
import tensorflow as tf
from _harness import handler_of


def candidates(slots: int, width: int, rows: int, vocabulary: int) -> dict[str, Callable[[], Any]]:
    """Return the bare product, a step on a full cache, and the published algorithm."""
    tf.random.set_seed(0)
    embedding = tf.Variable(tf.random.normal((vocabulary, width)) / width**0.5)
    query = tf.Variable(tf.random.normal((rows, width)))
    ids = tf.random.uniform((rows,), 0, vocabulary, tf.int64)
    all_ids = tf.range(slots, dtype=tf.int64) % vocabulary
    table = tf.Variable(tf.gather(embedding, all_ids), trainable=False)
    features = tf.Variable(all_ids, trainable=False)

    def step_of(dtype: tf.DType) -> Callable[[], Any]:
        handler = handler_of(negcache, slots, width, tf.int64, dtype)
        handler.cache.data["id"].assign(all_ids)
        handler.cache.data["embedding"].assign(tf.cast(table, dtype))
        handler.cache.age.assign(tf.range(slots))

        @tf.function
        def step() -> Any:
            with tf.GradientTape() as tape:
                loss = handler.update_cache_and_compute_loss(
                    lambda features: tf.gather(embedding, features["id"]),
                    tf.convert_to_tensor(query),
                    tf.gather(embedding, ids),
                    {"id": ids},
                )
            return loss, tape.gradient(loss, [query])

        return functools.partial(_value, step)

    @tf.function
    def product() -> tf.Tensor:
        return tf.matmul(query, table, transpose_b=True)

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

    return {
        "product": functools.partial(_value, product),
        "step": step_of(tf.float32),
        "bfloat16 step": step_of(tf.bfloat16),
        "published": functools.partial(_value, published),
    }


def _value(function: Callable[[], Any]) -> Any:
    """Wait until the function's results are there."""
    return [tensor.numpy()[:1] for tensor in tf.nest.flatten(function()) if tensor.shape.rank]
