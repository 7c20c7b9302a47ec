"""negcache's classes in JAX; what mypy knows of them stands in _bound.pyi."""

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
globals().update(BOUND._asdict())  # the names are those of _bound.pyi
