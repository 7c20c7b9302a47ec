"""Losses in JAX: pure functions that take a random key."""

import copy
from typing import Any, Self

from jax import Array

from negcache_core import CacheLossReturn, Retrieval

from ._backend import KeyStream, check_key


class KeyedLoss:
    """Cross-entropy of the positive against the positive and every written row of the cache.

    scale:     factor on the dot products, before score_transform: a number, or a function of no
               arguments that returns a trained one, unless the loss is made inside the
               differentiated function
    generator: must be None, as JAX keeps no hidden random state: a call takes `key=` for its draw

    It is a pure function.
    """

    generator: Any
    retrieval_fn: Any

    def with_keys(self, keys: KeyStream) -> Self:
        """Return this loss drawing from `keys`; so does its retrieval function, if it draws."""
        bound = copy.copy(self)
        bound.generator = keys
        if hasattr(self.retrieval_fn, "generator"):
            bound.retrieval_fn = copy.copy(self.retrieval_fn)
            bound.retrieval_fn.generator = keys
        return bound

    def retrieve(self, *arguments: Any, key: Array | None = None, **options: Any) -> Retrieval:
        """Draw negatives: the first phase. No gradient flows, and nothing is embedded.

        key: a key of jax.random, for the draw
        """
        if key is not None:
            return self.with_keys(KeyStream(check_key(key, "key"))).retrieve(*arguments, **options)
        return super().retrieve(*arguments, **options)  # type: ignore[misc] # the core's class

    def __call__(
        self, *arguments: Any, key: Array | None = None, **options: Any
    ) -> CacheLossReturn:
        """Retrieve, embed what was drawn with `doc_network`, and return the loss.

        key: a key of jax.random, for the draw
        """
        if key is not None:
            return self.with_keys(KeyStream(check_key(key, "key")))(*arguments, **options)
        return super().__call__(*arguments, **options)  # type: ignore[misc]


class ShardedKeyedLoss(KeyedLoss):
    """Cross-entropy against a cache that is cut into shards, one on each device of a mesh axis.

    group: the name of the axis, or a tuple of several
    scale: factor on the dot products, before score_transform: a number, or a function of no
           arguments that returns a trained one
    generator: must be None, as JAX keeps no hidden random state

    Call it inside `jax.shard_map`, with equal parts of the batch on all devices, and with the same
    key of the state on all. Outside, a handler's state is the whole cache: `handler.specs()` says
    how `shard_map` cuts it, and `handler.shardings(mesh)` where it lies. cache_size must be a
    multiple of the number of devices. The mean over devices of the loss is that of the whole batch:
    differentiate its `pmean`, and with `check_vma=False` take the `pmean` of the gradients too.
    With `top_k` no group may lie on two devices.

    Raises OptionError outside of `shard_map`, and ShapeError if `cache` is not a shard of the
    handler's.

    >>> import functools, jax, jax.numpy as jnp, negcache_jax as negcache
    >>> from jax.sharding import PartitionSpec as P
    >>> specs = {"x": negcache.FieldSpec((2,), jnp.float32),
    ...          "embedding": negcache.FieldSpec((2,), jnp.float32)}
    >>> handler = negcache.CacheLossHandler(
    ...     negcache.CacheManager(specs, cache_size=8),
    ...     negcache.DistributedCacheClassificationLoss("embedding", ("x",), group="data"),
    ...     embedding_key="embedding", data_keys=("x",), group="data")
    >>> auto = (jax.sharding.AxisType.Auto,)
    >>> mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=auto)
    >>> @functools.partial(jax.jit, donate_argnums=1)
    ... @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(), handler.specs(), P("data")),
    ...                    out_specs=(P(), P(), handler.specs()))
    ... def step(weights, state, x):
    ...     def loss_of(weights):
    ...         item_network = lambda features: features["x"] @ weights
    ...         loss, after = handler.update_cache_and_compute_loss(
    ...             state, item_network, x, item_network({"x": x}), {"x": x})
    ...         return jax.lax.pmean(loss, "data"), after
    ...     (loss, after), gradient = jax.value_and_grad(loss_of, has_aux=True)(weights)
    ...     return weights - 0.1 * gradient, loss, after
    >>> weights = jnp.eye(2)
    >>> state = jax.jit(handler.init, out_shardings=handler.shardings(mesh))(jax.random.key(0))
    >>> for seed in range(2):
    ...     x = jax.random.normal(jax.random.key(seed), (4 * jax.device_count(), 2))
    ...     weights, loss, state = step(weights, state, x)
    """

    def __init__(
        self, *arguments: Any, group: str | tuple[str, ...] = "data", **options: Any
    ) -> None:
        super().__init__(*arguments, group=group, **options)  # type: ignore[call-arg] # the core's
