"""negcache's classes in PyTorch; mypy reads their types from _bound.pyi."""

import contextlib
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from negcache_core import OptionError, handlers, losses
from negcache_core.adapter import bind

from ._backend import TORCH
from ._replicas import ProcessGroup
from ._store import BufferStore, table_name


class _Mode:
    @property
    def in_training(self) -> bool:
        return self.training


class _Loss(_Mode):
    forward = losses.CacheClassificationLoss.__call__
    __call__ = nn.Module.__call__


class _DistributedLoss(_Loss):
    """Cross-entropy against a cache that is cut into shards, one on each rank.

    group: a process group of torch.distributed; None: all ranks
    """


class _Handler(_Mode):
    def distributed_state_dict(self) -> dict[str, Tensor]:
        """Return the state for torch.distributed.checkpoint: each table is one shard of a DTensor.

        A checkpoint of it can be loaded on another number of ranks, in place: make the handler with
        the same cache_size, and pass this to `dcp.load`. Raises OptionError unless the cache is in
        shards.
        """
        setup = self._setup
        if not setup.placement.sharded:
            raise OptionError(
                "distributed_state_dict is for a sharded cache: this handler's loss is a "
                f"{type(self.cache_loss).__name__}. Use state_dict()."
            )
        state, replicas = self.state_dict(), setup.placement.replicas
        for name, manager in setup.managers.items():
            table = f"tables.{table_name(name)}."
            for field in [each for each in state if each.startswith(table)]:
                state[field] = replicas.as_shard(state[field], manager.cache_size)
        return state


class _OneCache(_Handler):
    forward = handlers.CacheLossHandler.update_cache_and_compute_loss
    __call__ = nn.Module.__call__


class _ManyCaches(_Handler):
    forward = handlers.MultiCacheLossHandler.update_cache_and_compute_loss
    __call__ = nn.Module.__call__


class _FrontDoor:
    """Softmax cross-entropy of each query's item against all items in a cache.

    embedding: an example batch of item embeddings (B, D), whose dtype the cache stores and on whose
               device it is made; or the width D, stored as float32
    group:     a process group of torch.distributed, or a DeviceMesh, whose ranks share one cache in
               shards; None: no sharing

    >>> import torch, negcache_torch as negcache
    >>> tower, x, ids = torch.nn.Linear(2, 4), torch.eye(2), torch.arange(2)
    >>> loss_fn = negcache.NegativeCacheLoss(
    ...     8, {"x": x}, tower(x), labels={"id": ids}, id_keys=("id",))
    >>> item_network = lambda features: tower(features["x"])
    >>> loss = loss_fn(item_network, tower(x), tower(x), {"x": x}, labels={"id": ids})
    >>> loss.backward()
    """

    def __init__(
        self, cache_size: int, features: Any, embedding: Any, *arguments: Any, **options: Any
    ) -> None:
        if isinstance(group := options.get("group"), DeviceMesh):
            options["group"] = group.get_group()
        # The cache is made on the example's device: it need not be moved, or fit anywhere else.
        where = embedding.device if isinstance(embedding, Tensor) else contextlib.nullcontext()
        with where:
            super().__init__(cache_size, features, embedding, *arguments, **options)


BOUND = bind(
    TORCH,
    "negcache_torch",
    module=nn.Module,
    store=BufferStore.of,
    replicas=ProcessGroup,
    mixins={
        "CacheClassificationLoss": _Loss,
        "DistributedCacheClassificationLoss": _DistributedLoss,
        "CacheLossHandler": _OneCache,
        "MultiCacheLossHandler": _ManyCaches,
        "NegativeCacheLoss": _FrontDoor,
    },
)
globals().update(BOUND._asdict())  # the names match _bound.pyi
