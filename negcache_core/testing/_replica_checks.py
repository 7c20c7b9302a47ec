"""Checks of replicas: what they send each other.

`Adapter.replicas` runs one function for each replica, with parts of the batch of different sizes.
If one program is traced for all devices, as in JAX and TensorFlow, an adapter leaves it out, and
its own tests compare shards with one big cache.
"""

from typing import Any

import numpy as np

from negcache_core.errors import OptionError
from negcache_core.sharding.replicas import Route
from negcache_core.testing._adapter import Adapter, Tree
from negcache_core.testing._scripts import (
    assert_equal,
    assert_raises,
    assert_true,
)

COUNT = 3
SIZES = (2, 0, 1)
OWNER = np.asarray([2, 0, 1, 2, 0, 1])  # two draws for each query


def check_replicas(adapter: Adapter) -> None:
    """Each verb sends what its definition says, for parts of different sizes and every dtype kind.

    numbers, texts, gather, gather_fresh (with its gradient), parts, sum_of_parts, serve, give_back,
    entries, first, own, agree, and noise that is the same on all.
    """
    if adapter.replicas is None:
        return
    given = adapter.replicas(COUNT, _use_verbs)
    ends = np.cumsum(SIZES)
    whole, draws = _rows(sum(SIZES)), _rows(len(OWNER))
    about = np.stack([100.0 * rank + whole[0] for rank in range(COUNT)])
    for rank in range(COUNT):
        own = slice(ends[rank] - SIZES[rank], ends[rank])
        drew = slice(2 * own.start, 2 * own.stop)
        expected: dict[str, Any] = {
            "place": (np.asarray(rank), np.asarray(COUNT), np.asarray(own.start)),
            "own": whole[0][own],
            "numbers": np.asarray([(each, 10 * each + 1) for each in range(COUNT)]),
            "texts": np.asarray([_text(each) for each in range(COUNT)]),
            "gather": whole,
            "gather_fresh": whole[0],
            "parts": about[:, own],
            "sum_of_parts": about[:, own].sum(axis=0),
            "entries": np.flatnonzero(rank == OWNER),
            "serve": tuple(each[drew] for each in draws),
            "give_back": tuple(each[rank == OWNER] for each in draws),
            "noise": given[0]["noise"],
        }
        if adapter.gradients is not None:  # the sum of (rank + 1) * whole over the replicas
            expected["gradient"] = (COUNT * (COUNT + 1) // 2 * whole[0])[own]
        path = f"replica {rank}"
        assert_equal(adapter.name, path, given[rank], expected, tolerance=0)
        message = str(given[rank]["message"])
        unlike = "width is 0 on 0, 1 on 1, 2 on 2" in message and "depth" not in message
        assert_true(unlike, f"{adapter.name}: agree does not say what differs: {message}")
    noise = given[0]["noise"]
    uniform = noise.shape == (sum(SIZES), 4, 2) and ((noise >= 0) & (noise < 1)).all()
    assert_true(uniform and len(np.unique(noise)) == noise.size, f"{adapter.name}: noise {noise}")


def _rows(count: int) -> tuple[Any, ...]:
    """Return rows of some dtypes and ranks, no two of them equal except bools."""
    place = np.arange(count)
    return (
        np.stack([place + 0.25, place - 7.5], axis=1),
        (place * 3 - 4).astype(np.int32),
        place % 2 == 0,
        place.astype(np.int64) + 2**40,
    )


def _text(rank: int) -> str:
    return "an ü and more"[: 4 + 3 * rank]


def _use_verbs(side: Adapter, rank: int) -> Tree:
    """Return what a replica gets from each verb."""
    loss = side.module.DistributedCacheClassificationLoss("embedding", ("x",), generator=rank)
    replicas, start = loss.replicas, sum(SIZES[:rank])
    own = slice(start, start + SIZES[rank])
    whole, draws = (side.native(_rows(count)) for count in (sum(SIZES), len(OWNER)))
    mine = side.native(tuple(each[own] for each in _rows(sum(SIZES))))
    like, owner = whole[0], side.to_native(OWNER)
    sizes = tuple(2 * size for size in SIZES)
    route = Route(owner, replicas.entries(owner), sizes)
    served = side.native(tuple(each[rank == OWNER] for each in _rows(len(OWNER))))
    about = side.to_native(100.0 * rank + _rows(sum(SIZES))[0])
    drawn = [replicas.own(each, sizes) for each in draws]
    found = {
        "own": replicas.own(whole[0], SIZES),
        "gather": tuple(replicas.gather(mine, SIZES)),
        "gather_fresh": replicas.gather_fresh(mine[0], SIZES),
        "parts": replicas.parts(about, SIZES),
        "sum_of_parts": replicas.sum_of_parts(about, SIZES),
        "entries": route.entries,
        "serve": tuple(replicas.serve(served, route)),
        "give_back": tuple(replicas.give_back(drawn, route)),
    }
    replicas.share_generator(loss.generator, like)
    found["noise"] = replicas.noise(loss.backend, loss.generator, SIZES, 4, like)
    found = side.numpy(found)
    found["place"] = tuple(
        np.asarray(each) for each in (replicas.rank, replicas.count, replicas.first(SIZES))
    )
    found["numbers"] = np.asarray(replicas.numbers([rank, 10 * rank + 1], like))
    found["texts"] = np.asarray(replicas.texts(_text(rank), like))
    if side.gradients is not None:
        xp = loss.backend.xp

        def value(rows: Any) -> Any:
            return xp.sum(replicas.gather_fresh(rows, SIZES) * (rank + 1) * whole[0])

        found["gradient"] = np.asarray(side.gradients(value, [mine[0]])[0])
    replicas.agree({"depth": 2, "width": 3}, like)
    error = assert_raises(
        side.name, OptionError, lambda: replicas.agree({"depth": 2, "width": rank}, like)
    )
    found["message"] = np.asarray(str(error))
    return found
