"""All that an adapter supplies, in one place: verbs, a store, replicas; and `bind`.

1. A `Backend`: the verbs of one array library, with its namespace (the array API, and of `EXTRAS`
   what it has a better form of).
2. A `Store`: where the caches are, if not in arrays that are written in place.
3. `Replicas`: only for a cache in shards.
4. `bind(backend, package, …)` makes the public classes of these.

CONTRIBUTING.md, "Write an adapter", goes through them; `negcache_core.testing` checks the result.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from negcache_core.arrays._array import EXTRAS, Array
from negcache_core.arrays.backend import ACCELERATOR_TILE, CPU_TILE, Backend
from negcache_core.arrays.validation import as_array
from negcache_core.cache.filters import IsInCacheFilterFn
from negcache_core.cache.manager import CacheManager
from negcache_core.cache.named import Caches
from negcache_core.docstrings import merged
from negcache_core.handlers.base import BaseHandler
from negcache_core.handlers.cache_loss_handler import CacheLossHandler
from negcache_core.handlers.multi_cache_loss_handler import MultiCacheLossHandler
from negcache_core.handlers.negative_cache_loss import NegativeCacheLoss, Parts
from negcache_core.handlers.setup import Setup
from negcache_core.handlers.store import Store
from negcache_core.losses.classification import CacheClassificationLoss
from negcache_core.retrieval.retrieval_fns import GumbelMaxRetrievalFn, MaxScoreRetrievalFn
from negcache_core.retrieval.top_k import approximate_top_k_with_indices
from negcache_core.sharding.classification import DistributedCacheClassificationLoss
from negcache_core.sharding.replicas import Replicas, Route
from negcache_core.tools.chunks import in_chunks

__all__ = [
    "ACCELERATOR_TILE",
    "CPU_TILE",
    "EXTRAS",
    "Array",
    "Backend",
    "Bound",
    "Caches",
    "Replicas",
    "Route",
    "Setup",
    "Store",
    "bind",
]


class Bound(NamedTuple):
    """The public names that belong to an array library, bound to it."""

    CacheManager: type[CacheManager]
    CacheClassificationLoss: type[CacheClassificationLoss]
    DistributedCacheClassificationLoss: type[DistributedCacheClassificationLoss]
    CacheLossHandler: type[CacheLossHandler]
    MultiCacheLossHandler: type[MultiCacheLossHandler]
    NegativeCacheLoss: type[NegativeCacheLoss]
    IsInCacheFilterFn: type[IsInCacheFilterFn]
    MaxScoreRetrievalFn: type[MaxScoreRetrievalFn]
    GumbelMaxRetrievalFn: type[GumbelMaxRetrievalFn]
    approximate_top_k_with_indices: Callable[[Array, int], tuple[Array, Array]]
    in_chunks: Callable[[Callable[[Any], Array], int], Callable[[Any], Array]]


_STATEFUL = (
    CacheClassificationLoss,
    DistributedCacheClassificationLoss,
    CacheLossHandler,
    MultiCacheLossHandler,
    GumbelMaxRetrievalFn,
)
_STATELESS = (CacheManager, IsInCacheFilterFn, MaxScoreRetrievalFn)


def bind(
    backend: Backend,
    package: str,
    *,
    module: type = object,
    store: Callable[[Setup], Store] | None = None,
    replicas: Callable[[Any], Replicas] | None = None,
    mixins: Mapping[str, type] | None = None,
) -> Bound:
    """Return negcache's classes on `backend`.

    package:  the name of the adapter's package, from which the classes are imported
    module:   what losses, handlers and drawing functions are besides, such as torch.nn.Module: the
              framework then finds their parameters and state
    store:    a handler's Setup -> the Store of its caches, empty; None for arrays in a dict
    replicas: the group of a distributed loss -> its Replicas; None for a library that has none
    mixins:   class name -> a class whose attributes come before those of the core's class

    >>> from negcache_core import FieldSpec
    >>> from negcache_core.arrays import NUMPY
    >>> bind(NUMPY, "mine").CacheManager({"x": FieldSpec((2,), "float32")}, 8).cache_size
    8
    """

    def bound(cls: Any, *bases: type, **more: Any) -> Any:
        mixin = (mixins or {}).get(cls.__name__)
        before = () if mixin is None else (mixin,)
        own: dict[str, Any] = {"__module__": package, "backend": backend}
        own |= more
        own["__doc__"] = merged(cls.__doc__, None if mixin is None else mixin.__doc__)
        if store is not None and issubclass(cls, BaseHandler):
            own["make_store"] = staticmethod(store)
        if replicas is not None and issubclass(cls, DistributedCacheClassificationLoss):
            own["make_replicas"] = staticmethod(replicas)
        rest = [base for base in bases if base is not object]
        return type(cls.__name__, (*before, cls, *rest), own)

    def top_k(scores: Array, k: int) -> tuple[Array, Array]:
        scores = as_array(scores, "scores", backend)
        return approximate_top_k_with_indices(scores, k, xp=backend.xp)

    def chunks(network: Callable[[Any], Array], size: int) -> Callable[[Any], Array]:
        return in_chunks(network, size, backend=backend)

    for function, origin in ((top_k, approximate_top_k_with_indices), (chunks, in_chunks)):
        function.__name__ = function.__qualname__ = origin.__name__
        function.__doc__ = merged(origin.__doc__, None)
    classes = {cls.__name__: bound(cls, module) for cls in _STATEFUL}
    classes |= {cls.__name__: bound(cls) for cls in _STATELESS}
    parts = Parts(
        classes["CacheManager"],
        classes["CacheClassificationLoss"],
        classes["DistributedCacheClassificationLoss"],
    )
    front_door = bound(NegativeCacheLoss, classes["CacheLossHandler"], parts=parts)
    classes["NegativeCacheLoss"] = front_door
    return Bound(**classes, approximate_top_k_with_indices=top_k, in_chunks=chunks)
