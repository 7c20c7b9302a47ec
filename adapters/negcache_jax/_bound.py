"""negcache's classes in JAX; mypy reads their types from _bound.pyi."""

from typing import Any

from jax.sharding import AbstractMesh, Mesh

from negcache_core.adapter import bind

from ._backend import JAX
from ._handler import Holding, StateHandler
from ._loss import KeyedLoss, ShardedKeyedLoss
from ._replicas import MeshAxis
from ._store import NoStore

# Handlers that hold a state while it is worked on.
_HOLDING = bind(
    JAX,
    "negcache_jax",
    mixins={"CacheLossHandler": Holding, "MultiCacheLossHandler": Holding},
)


class _OneCache(StateHandler):
    holding = _HOLDING.CacheLossHandler


class _ManyCaches(StateHandler):
    holding = _HOLDING.MultiCacheLossHandler


class _FrontDoor:
    """Softmax cross-entropy of each query's item against all items in a cache.

    scale: factor on the dot products, the inverse of the temperature: a number, or a function of no
           arguments that returns a trained one. 20 suits embeddings of length 1.
    group: the name of a mesh axis, or a tuple of several, or a jax.sharding.Mesh for all of its
           axes, whose devices share one cache in shards: see DistributedCacheClassificationLoss.
           None: no sharing

    The loss has no state of its own: make one with `init`, give it to each call, and take the new
    one from what the call returns.

    >>> import functools, jax, jax.numpy as jnp, negcache_jax as negcache
    >>> from jax.sharding import PartitionSpec as P
    >>> auto = (jax.sharding.AxisType.Auto,)
    >>> mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=auto)
    >>> loss_fn = negcache.NegativeCacheLoss(8, {"x": jnp.zeros((1, 2))}, embedding=2, group=mesh)
    >>> @functools.partial(jax.jit, donate_argnums=1)
    ... @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(), loss_fn.specs(), P("data")),
    ...                    out_specs=(P(), P(), loss_fn.specs()))
    ... def step(weights, state, x):
    ...     def loss_of(weights):
    ...         item_network = lambda features: features["x"] @ weights
    ...         loss, after = loss_fn(state, item_network, x, item_network({"x": x}), {"x": x})
    ...         return jax.lax.pmean(loss, "data"), after
    ...     (loss, after), gradient = jax.value_and_grad(loss_of, has_aux=True)(weights)
    ...     return weights - 0.1 * gradient, loss, after
    >>> weights = jnp.eye(2)
    >>> state = jax.jit(loss_fn.init, out_shardings=loss_fn.shardings(mesh))(jax.random.key(0))
    >>> for seed in range(2):
    ...     x = jax.random.normal(jax.random.key(seed), (4 * jax.device_count(), 2))
    ...     weights, loss, state = step(weights, state, x)
    """

    def __init__(self, *arguments: Any, group: Any = None, **options: Any) -> None:
        if isinstance(group, (Mesh, AbstractMesh)):
            axes = tuple(group.axis_names)
            group = axes[0] if len(axes) == 1 else axes
        super().__init__(*arguments, group=group, **options)


BOUND = bind(
    JAX,
    "negcache_jax",
    store=NoStore.of,
    replicas=MeshAxis,
    mixins={
        "CacheClassificationLoss": KeyedLoss,
        "DistributedCacheClassificationLoss": ShardedKeyedLoss,
        "CacheLossHandler": _OneCache,
        "MultiCacheLossHandler": _ManyCaches,
        "NegativeCacheLoss": _FrontDoor,
    },
)
globals().update(BOUND._asdict())  # the names match _bound.pyi
