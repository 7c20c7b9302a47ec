"""Real processes over gloo: what wraps a model leaves each rank the cache that it would have alone.

Bit for bit: a rank's state is compared with that of one process that does what all ranks do.
"""

import contextlib
import copy
import functools

import negcache_torch as negcache
import torch
import torch.distributed as dist
from cached_towers import STATE, Model, assert_same, batch
from ranks import run
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.nn.parallel import DistributedDataParallel

RANKS, CPU = 2, torch.device("cpu")


def whole(model, **options):
    return fully_shard(model, **options)


def layers(model, **options):
    for tower in (model.query, model.item):
        fully_shard(tower, **options)
    return fully_shard(model, **options)


def in_half(model):
    return whole(model, mp_policy=MixedPrecisionPolicy(torch.bfloat16, cast_forward_inputs=False))


def wrapped_in_half(model):
    half = torch.bfloat16
    return FullyShardedDataParallel(
        model,
        device_id=CPU,
        mixed_precision=MixedPrecision(half, buffer_dtype=half, cast_forward_inputs=False),
        use_orig_params=True,
    )


DDP = DistributedDataParallel
WRAPPERS = {
    "ddp": DDP,
    "ddp broadcasts": functools.partial(DDP, broadcast_buffers=True),
    "ddp static": functools.partial(DDP, static_graph=True),
    "ddp unused": functools.partial(DDP, find_unused_parameters=True),
    "fsdp2": whole,
    "fsdp2 layers": layers,
    "fsdp1": functools.partial(FullyShardedDataParallel, device_id=CPU, use_orig_params=True),
}
HALVES = {"fsdp2": in_half, "fsdp1": wrapped_in_half}


def models(**options):
    """Return one model of each rank: the same towers, and a cache of its own, partly written."""
    torch.manual_seed(0)
    first = Model(generator=0, **options)
    found = [first]
    for rank in range(1, RANKS):
        model = Model(generator=rank, **options)
        model.load_state_dict(
            {**first.state_dict(), **{k: v for k, v in model.state_dict().items() if k in STATE}}
        )
        found.append(model)
    for rank, model in enumerate(found):
        model(data(rank, 99))
    return found


def data(rank, step):
    return batch(1000 * rank + step)


def train(model, rank, steps, *, micro=1):
    """Train a wrapped model, with no_sync() for all micro-steps but the last."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in steps:
        optimizer.zero_grad()
        for number in range(micro):
            last = number == micro - 1
            with contextlib.nullcontext() if last else model.no_sync():
                model(data(rank, step * micro + number)).backward()
        optimizer.step()


def train_all(all_models, steps, *, micro=1):
    """Do in one process what all ranks do."""
    optimizers = [torch.optim.SGD(model.parameters(), 0.1) for model in all_models]
    for step in steps:
        for rank, (model, optimizer) in enumerate(zip(all_models, optimizers, strict=True)):
            optimizer.zero_grad()
            for number in range(micro):
                model(data(rank, step * micro + number)).backward()
        for each in zip(*(model.parameters() for model in all_models), strict=True):
            mean = sum(parameter.grad / RANKS for parameter in each)
            for parameter in each:
                parameter.grad = mean.clone()
        for optimizer in optimizers:
            optimizer.step()


def own(model):
    """Return the handler's part of a model's state, without what a wrapper puts before names."""
    state = {key.removeprefix("module."): value for key, value in model.state_dict().items()}
    return {key: value.clone() for key, value in state.items() if key in STATE}


def keeps(rank, name):
    alone, mine = models(), models()[rank]
    model = WRAPPERS[name](mine)
    assert_same(own(model), alone[rank].state())
    for steps in (range(3), range(3, 6)):
        train(model, rank, steps)
        train_all(alone, steps)
        assert_same(own(model), alone[rank].state())
    assert not torch.equal(alone[0].handler.cache.data["x"], alone[1].handler.cache.data["x"])
    assert int(alone[rank].handler.cache.age.max()) < negcache.EMPTY
    checkpoints(rank, name, model)


def checkpoints(rank, name, model):
    """Each rank's own state goes through get_ and set_model_state_dict, whatever the wrapper."""
    before = own(model)
    state = copy.deepcopy(get_model_state_dict(model))
    assert_same({key: state[key] for key in STATE}, before)
    other = WRAPPERS[name](models()[rank])
    set_model_state_dict(other, state, options=StateDictOptions(strict=True))
    assert_same(own(other), before)
    train(model, rank, [50])
    train(other, rank, [50])
    assert_same(own(other), own(model))


def keep(rank):
    for name in WRAPPERS:
        keeps(rank, name)


def test_every_wrapper_leaves_each_rank_its_own_rows(tmp_path):
    run(tmp_path, keep, ranks=RANKS)


def accumulate(rank):
    for name in ("ddp", "ddp broadcasts"):
        alone, mine = models(), models()[rank]
        model = WRAPPERS[name](mine)
        train(model, rank, range(3), micro=2)
        train_all(alone, range(3), micro=2)
        assert_same(own(model), alone[rank].state())


def test_accumulated_gradients_under_no_sync(tmp_path):
    run(tmp_path, accumulate, ranks=RANKS)


def cast(rank):
    """Mixed precision casts parameters and buffers: no table, and not a row that is in it."""
    for wrapper in HALVES.values():
        mine = models()[rank]
        before = mine.state()
        model = wrapper(mine)
        age = mine.handler.cache.age
        assert_same(own(model), before)
        model(data(rank, 0))
        after = own(model)
        kept = (age < negcache.EMPTY) & (age > 0)
        for key, value in before.items():
            assert after[key].dtype == value.dtype
            if "field" in key and "embedding" not in key:  # those of drawn rows are fresh
                assert torch.equal(after[key][kept], value[kept]), key
        assert int(kept.sum()) > 0


def test_mixed_precision_casts_no_rows(tmp_path):
    run(tmp_path, cast, ranks=RANKS)


def shards(rank):
    """A cache in shards: as the same towers train without a wrapper, gradients averaged by hand."""
    for name in ("ddp", "ddp broadcasts", "fsdp2 layers"):
        torch.manual_seed(0)
        plain = Model(kind="DistributedCacheClassificationLoss", estimator="shared")
        model = WRAPPERS[name](copy.deepcopy(plain))
        optimizer = torch.optim.SGD(plain.parameters(), 0.1)
        for step in range(6):
            train(model, rank, [step])
            optimizer.zero_grad()
            plain(data(rank, step)).backward()
            for parameter in plain.parameters():
                parameter.grad /= RANKS
                dist.all_reduce(parameter.grad)
            optimizer.step()
            assert_same(own(model), plain.state())
        assert int(plain.handler.cache.age.max()) < negcache.EMPTY
        rows = [torch.empty_like(plain.handler.cache.data["x"]) for _ in range(RANKS)]
        dist.all_gather(rows, plain.handler.cache.data["x"])
        assert not torch.equal(*rows)


def test_a_cache_in_shards_needs_no_more(tmp_path):
    run(tmp_path, shards, ranks=RANKS)


def on_meta(rank):
    """The way of large models: sharded before there is memory; then the cache is a new one."""
    new = Model(generator=rank).state()
    for name in ("fsdp2 layers", "fsdp1"):
        with torch.device("meta"):
            model = Model(generator=rank)
        model = WRAPPERS[name](model)
        if name != "fsdp1":  # which does so itself
            model.to_empty(device=CPU)
            for tower in (model.query, model.item):
                tower.reset_parameters()
        assert_same(own(model), new)
        train(model, rank, range(2))
        state = own(model)
        assert torch.equal(state["handler.tables.cache_cache.field_x"][:3], data(rank, 0))


def test_a_model_that_is_sharded_on_meta_has_a_new_cache(tmp_path):
    run(tmp_path, on_meta, ranks=RANKS)
