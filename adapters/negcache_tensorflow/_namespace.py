"""The few array functions that the core calls, for TensorFlow, which has no array-API namespace.

Only what differs from `tf` is written out. Nothing global is switched.
"""

from typing import Any

import tensorflow as tf

bool = tf.bool
float16, bfloat16, float32, float64 = tf.float16, tf.bfloat16, tf.float32, tf.float64
int8, int16, int32, int64 = tf.int8, tf.int16, tf.int32, tf.int64
uint8, uint16, uint32, uint64 = tf.uint8, tf.uint16, tf.uint32, tf.uint64
index_dtype = tf.int64

abs, exp, log, log1p, isfinite = tf.abs, tf.exp, tf.math.log, tf.math.log1p, tf.math.is_finite
sqrt, round = tf.sqrt, tf.round
clip, maximum, minimum, reshape = tf.clip_by_value, tf.maximum, tf.minimum, tf.reshape
astype, take_rows = tf.cast, tf.gather
matmul, sort = tf.matmul, tf.sort


def device_of(array: tf.Tensor) -> None:
    del array  # TensorFlow places tensors itself


def asarray(value: Any) -> tf.Tensor:
    return tf.convert_to_tensor(value)


def arange(stop: Any, *, dtype: tf.DType = tf.int64, device: Any = None) -> tf.Tensor:
    del device
    return tf.range(tf.cast(stop, dtype), dtype=dtype)


def zeros(shape: Any, *, dtype: tf.DType) -> tf.Tensor:
    return tf.zeros(shape, dtype)


def zeros_like(like: tf.Tensor) -> tf.Tensor:
    # Not tf.zeros_like: in a graph, its product with a column of no rows ends the process.
    return tf.fill(tf.shape(like), tf.zeros((), like.dtype))


def full(shape: Any, value: Any, *, dtype: tf.DType, device: Any = None) -> tf.Tensor:
    del device
    if not tf.is_tensor(value):
        value = dtype.as_numpy_dtype(value)  # tf.cast would round it to float32 first
    return tf.fill(shape, tf.cast(value, dtype))


def full_like(like: tf.Tensor, value: Any, *, dtype: tf.DType) -> tf.Tensor:
    return tf.fill(tf.shape(like), tf.cast(value, dtype))


def ones_like(like: tf.Tensor, *, dtype: tf.DType) -> tf.Tensor:
    return tf.ones_like(like, dtype=dtype)


def where(condition: tf.Tensor, left: Any, right: Any) -> tf.Tensor:
    dtype = left.dtype if hasattr(left, "dtype") else right.dtype
    left, right = (
        side if hasattr(side, "dtype") else tf.constant(side, dtype) for side in (left, right)
    )
    return tf.where(condition, left, right)


def broadcast_to(array: tf.Tensor, shape: Any) -> tf.Tensor:
    return tf.broadcast_to(array, tf.stack([tf.cast(size, tf.int64) for size in shape]))


def concat(arrays: Any, *, axis: int = 0) -> tf.Tensor:
    return tf.concat(arrays, axis)


def sum(array: tf.Tensor, *, axis: Any = None) -> tf.Tensor:
    return tf.reduce_sum(array, axis)


def mean(array: tf.Tensor, *, axis: Any = None) -> tf.Tensor:
    return tf.reduce_mean(array, axis)


def max(array: tf.Tensor, *, axis: Any = None, keepdims: Any = False) -> tf.Tensor:
    return tf.reduce_max(array, axis, keepdims)


def all(array: tf.Tensor, *, axis: Any = None) -> tf.Tensor:
    return tf.reduce_all(array, axis)


def any(array: tf.Tensor, *, axis: Any = None) -> tf.Tensor:
    return tf.reduce_any(array, axis)


def argmax(array: tf.Tensor, *, axis: int) -> tf.Tensor:
    return tf.argmax(array, axis, output_type=tf.int64)


def argsort(array: tf.Tensor, *, stable: Any) -> tf.Tensor:
    return tf.cast(tf.argsort(array, stable=stable), tf.int64)


def searchsorted(ordered: tf.Tensor, values: tf.Tensor) -> tf.Tensor:
    return tf.searchsorted(ordered, values, out_type=tf.int64)


def cumulative_sum(array: tf.Tensor, *, axis: int) -> tf.Tensor:
    return tf.cumsum(array, axis)


def matrix_transpose(array: tf.Tensor) -> tf.Tensor:
    return tf.linalg.matrix_transpose(array)


def matmul_transposed(left: tf.Tensor, right: tf.Tensor) -> tf.Tensor:
    return tf.matmul(left, right, transpose_b=True)


def dynamic_length(array: tf.Tensor, axis: int) -> tf.Tensor:
    return tf.shape(array, out_type=tf.int64)[axis]


def largest(values: tf.Tensor, count: Any) -> tf.Tensor:
    # TensorFlow documents that ties go to the lower index.
    return tf.cast(tf.math.top_k(values, tf.cast(count, tf.int32)).indices, tf.int64)


def put_rows(table: tf.Tensor, slots: tf.Tensor, rows: tf.Tensor) -> tf.Tensor:
    return tf.tensor_scatter_nd_update(table, slots[:, None], rows)
