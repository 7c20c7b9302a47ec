"""negcache's classes in JAX; what mypy knows of them stands in _bound.pyi."""

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
    },
)
globals().update(BOUND._asdict())  # the names are those of _bound.pyi
