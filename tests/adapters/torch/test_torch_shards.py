"""Real processes over gloo: a cache in shards is the one big cache, in loss, gradient and state."""

import copy
import os
import signal
from datetime import timedelta

import negcache_torch as negcache
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import run, start
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

RANKS, CAPACITY, WIDTH = 3, 10, 3  # shards of 4, 4 and 2 slots
OPTIONS = [
    {"estimator": "paper"},
    {"estimator": "paper", "num_samples": 2, "in_batch_negatives": True},
    {"estimator": "paper", "top_k": 4, "id_key": "id"},
    {"estimator": "shared", "id_key": "id", "in_batch_negatives": True},
    {"estimator": "shared", "top_k": 3, "log_frequency_key": "log_q", "num_samples": 2},
    {"estimator": "shared", "staleness_correction": True, "id_key": "id"},
    {"estimator": "exact_query", "in_batch_negatives": True, "log_frequency_key": "log_q"},
    {"estimator": "exact_query", "id_key": "id", "staleness_correction": True, "num_samples": 2},
    {"estimator": "paper", "id_keys": ("id", "owner"), "margin": 0.2, "top_k": 4},
    {"estimator": "shared", "id_keys": ("id", "owner"), "margin": 0.5, "in_batch_negatives": True},
    {"estimator": "exact_query", "group_key": "owner", "id_key": "id", "in_batch_negatives": True},
]
FIELDS = ("x", "id", "owner", "log_q")
SPECS = {
    "x": negcache.FieldSpec((2,), torch.float64),
    "id": negcache.FieldSpec((), torch.int32),
    "owner": negcache.FieldSpec((), torch.int64),
    "log_q": negcache.FieldSpec((), torch.float64),
    "embedding": negcache.FieldSpec((WIDTH,), torch.float64),
}


class Batch:
    """The parts of a whole batch, by rank; sizes differ, and some are empty."""

    def __init__(self, step):
        rng = np.random.default_rng(step)
        self.sizes = [(2, 0, 1), (1, 2, 0), (0, 1, 2), (2, 2, 2), (1, 0, 0)][step % 5]
        rows = sum(self.sizes)
        draw = {
            "y": rng.normal(size=(rows, 2)),
            "x": rng.normal(size=(rows, 2)),
            "id": rng.integers(0, 4, rows).astype(np.int32),
            "owner": rng.integers(0, 3, rows),
            "hard_id": rng.integers(0, 4, (rows, 2)).astype(np.int32),
            "hard_owner": rng.integers(0, 3, (rows, 2)),
            "log_q": rng.normal(size=rows),
            "hard": rng.normal(size=(rows, 2, 2)),
            "weight": rng.random(rows) * 2,
            "more": rng.normal(size=(rows, 3)),
        }
        self.all = {key: torch.from_numpy(value) for key, value in draw.items()}

    def part(self, rank):
        return {key: value.split(self.sizes)[rank] for key, value in self.all.items()}


class Towers:
    """Two linear towers and a scale, the same at first on every rank."""

    def __init__(self):
        torch.manual_seed(1)
        self.parameters = [
            torch.randn(2, WIDTH, dtype=torch.float64, requires_grad=True),
            torch.randn(2, WIDTH, dtype=torch.float64, requires_grad=True),
            torch.tensor(1.5, dtype=torch.float64, requires_grad=True),
        ]

    def item(self, features):
        return features["x"] @ self.parameters[1]

    def scale(self):
        return self.parameters[2]

    def arguments(self, batch):
        features = {key: batch[key] for key in FIELDS}
        given = (self.item, batch["y"] @ self.parameters[0], self.item(features))
        more = {
            "hard_negative_embeddings": batch["hard"] @ self.parameters[1],
            "hard_negative_features": {"id": batch["hard_id"], "owner": batch["hard_owner"]},
            "competing_scores": self.scale() * batch["more"],
            "sample_weight": batch["weight"],
        }
        return given, features, more

    def descend(self, gradients):
        with torch.no_grad():
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.sub_(gradient, alpha=0.1)


def sharded_handler(towers, options, capacity=CAPACITY, **more):
    return negcache.CacheLossHandler(
        negcache.CacheManager(SPECS, capacity),
        negcache.DistributedCacheClassificationLoss(
            "embedding", ("x",), scale=towers.scale, **{"generator": 5, **options}
        ),
        embedding_key="embedding",
        data_keys=("x",),
        **more,
    )


def whole_handler(towers, options):
    sizes = {"0": 4, "1": 4, "2": 2}
    return negcache.MultiCacheLossHandler(
        {name: negcache.CacheManager(SPECS, size) for name, size in sizes.items()},
        negcache.CacheClassificationLoss(
            "embedding", ("x",), scale=towers.scale, **{"generator": 5, **options}
        ),
        embedding_key="embedding",
        data_keys=("x",),
    )


def commit_whole(handler, result, positive, batch):
    """Put each rank's new rows into the cache that stands for its shard."""
    cut = {key: batch.all[key].split(batch.sizes) for key in FIELDS}
    handler.commit(
        result,
        dict(zip("012", positive.split(batch.sizes), strict=True)),
        {str(r): {key: each[r] for key, each in cut.items()} for r in range(RANKS)},
    )


def average(values):
    """Do what data-parallel training does with gradients."""
    values = [torch.zeros(()) if value is None else value.detach().clone() for value in values]
    for value in values:
        dist.all_reduce(value)
    return [value / dist.get_world_size() for value in values]


def compare_with_one_process(rank, options):
    ours, theirs = Towers(), Towers()
    sharded, whole = sharded_handler(ours, options), whole_handler(theirs, options)
    for step in range(7):
        batch = Batch(step)
        given, features, more = ours.arguments(batch.part(rank))
        loss = sharded.update_cache_and_compute_loss(*given, features, **more)
        gradients = torch.autograd.grad(loss, ours.parameters)
        (value, *gradients) = average([loss, *gradients])

        given, features, more = theirs.arguments(batch.all)
        # The phases, as the positives of one big cache are in no order of names.
        expected = whole.cache_loss(
            *given,
            whole.cache,
            pos_features={key: batch.all[key] for key in FIELDS},
            **more,
        )
        commit_whole(whole, expected, given[2], batch)
        wanted = torch.autograd.grad(expected.loss, theirs.parameters)
        torch.testing.assert_close(value, expected.loss.detach(), rtol=1e-9, atol=1e-11)
        for gradient, other in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(gradient, other, rtol=1e-9, atol=1e-11)
        shard = whole.cache[str(rank)]
        assert torch.equal(sharded.cache.age, shard.age), (
            options,
            step,
            sharded.cache.age,
            shard.age,
        )
        for key, table in sharded.cache.data.items():
            torch.testing.assert_close(table, shard.data[key], rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(sharded.metrics["fill"], expected.metrics["fill"])
        ours.descend(gradients)
        theirs.descend(wanted)


def every_option(rank):
    for options in OPTIONS:
        compare_with_one_process(rank, options)


def test_shards_are_the_one_big_cache_with_every_option(tmp_path):
    run(tmp_path, every_option, ranks=RANKS)


def with_ddp(rank):
    """One forward pass for positives and negatives, in DDP with buffers: the global mean."""
    for options in ({"estimator": "paper"}, {"estimator": "shared", "in_batch_negatives": True}):
        torch.manual_seed(0)
        towers = torch.nn.ModuleDict(
            {
                "query": torch.nn.Linear(2, WIDTH, dtype=torch.float64),
                "item": torch.nn.Linear(2, WIDTH, dtype=torch.float64),
            }
        )
        towers.register_buffer("steps", torch.zeros(()))  # DDP sends buffers in each forward pass
        alone = copy.deepcopy(towers)
        parallel = torch.nn.parallel.DistributedDataParallel(Encoder(towers))
        ours, theirs = Towers(), Towers()
        sharded, whole = sharded_handler(ours, options), whole_handler(theirs, options)
        for step in range(4):
            batch = Batch(step)
            part = batch.part(rank)
            features = {key: part[key] for key in FIELDS}
            # Retrieval needs the queries first, and no gradient: the module without its wrapper.
            with torch.no_grad():
                retrieval = sharded.retrieve(parallel.module.query(part["y"]), features)
            both = torch.cat([part["x"], retrieval.features["x"]])
            query, items = parallel(part["y"], both)
            positive, negative = items.split([len(part["x"]), len(items) - len(part["x"])])
            result = sharded.compute_loss(query, positive, negative, retrieval)
            parallel.zero_grad()
            result.loss.backward()
            sharded.commit(result, positive, features)

            query, positive = alone["query"](batch.all["y"]), alone["item"](batch.all["x"])
            expected = whole.cache_loss(
                lambda features, item=alone["item"]: item(features["x"]),
                query,
                positive,
                whole.cache,
                pos_features={"x": batch.all["x"]},
            )
            commit_whole(whole, expected, positive, batch)
            alone.zero_grad()
            expected.loss.backward()
            for ours_, theirs_ in zip(towers.parameters(), alone.parameters(), strict=True):
                torch.testing.assert_close(ours_.grad, theirs_.grad, rtol=1e-9, atol=1e-11)


class Encoder(torch.nn.Module):
    def __init__(self, towers):
        super().__init__()
        self.towers = towers

    def query(self, y):
        return self.towers["query"](y)

    def forward(self, y, x):
        return self.query(y), self.towers["item"](x)


def test_under_ddp_the_gradient_is_that_of_the_global_mean(tmp_path):
    run(tmp_path, with_ddp, ranks=RANKS)


def unlike(rank, options, capacity, message):
    """The first step says what differs, on every rank."""
    towers = Towers()
    handler = sharded_handler(towers, options[rank], capacity[rank])
    given, features, more = towers.arguments(Batch(3).part(rank))
    with pytest.raises(negcache.OptionError, match=message):
        handler.update_cache_and_compute_loss(*given, features, **more)
    assert (handler.cache.age == negcache.EMPTY).all()


@pytest.mark.parametrize(
    ("options", "capacity", "message"),
    [
        (
            [{}, {}, {"estimator": "shared"}],
            [9, 9, 9],
            "estimator is paper on 0, paper on 1, shared on 2",
        ),
        ([{}] * 3, [9, 12, 9], r"cache\.cache_size is 9 on 0, 12 on 1, 9 on 2"),
        ([{"id_key": "id"}, {}, {}], [9] * 3, r"id_keys is \('id',\) on 0, \(\) on 1"),
        ([{}, {}, {"margin": 1}], [9] * 3, "margin is None on 0, None on 1, 1 on 2"),
    ],
    ids=["estimator", "capacity", "key", "margin"],
)
def test_ranks_that_are_set_up_differently_are_told(tmp_path, options, capacity, message):
    run(tmp_path, unlike, options, capacity, message, ranks=RANKS)


def lost(rank, path, how):
    """Rank 1 dies, or hangs, in a step: within the time-out the others stop, caches as before."""
    towers, group = Towers(), dist.new_group(timeout=timedelta(seconds=6))
    handler = sharded_handler(towers, {"estimator": "shared", "group": group}, group=group)
    for step in range(3):
        given, features, more = towers.arguments(Batch(3 + 5 * step).part(rank))
        before = {key: value.clone() for key, value in handler.state_dict().items()}

        def item(data):
            if step == 2 and rank == 1:  # noqa: B023 - it is called in this very turn
                os.kill(os.getpid(), how)
            return towers.item(data)

        try:
            handler.update_cache_and_compute_loss(item, *given[1:], features, **more)
        except RuntimeError as error:
            assert step == 2
            state = handler.state_dict()
            for key, value in before.items():
                if "generator" not in key:
                    assert torch.equal(state[key], value), key
            (path / f"stopped_{rank}").write_text(str(error))
            os._exit(0)  # the group is broken


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hanging"])
def test_a_rank_that_is_lost_stops_the_others(tmp_path, how):
    context = start(tmp_path / "store", lost, tmp_path, how, ranks=RANKS)
    for rank in (0, 2, 1):
        if (rank, how) == (1, signal.SIGSTOP):
            context.processes[1].kill()
        context.processes[rank].join(timeout=100)
    assert [process.exitcode for process in context.processes] == [0, -signal.SIGKILL, 0]
    assert {path.name for path in tmp_path.glob("stopped_*")} == {"stopped_0", "stopped_2"}


def whole_cache(handler):
    """Return all shards' rows, in the order of ranks, as lists."""
    cache, found = handler.cache, {}
    for key, table in {**cache.data, "age": cache.age}.items():
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, table.tolist())
        found[key] = [row for part in parts for row in part]
    return found


def save_checkpoint(rank, path):
    towers = Towers()
    handler = sharded_handler(towers, {"estimator": "shared"})
    for step in (3, 8, 13):
        given, features, more = towers.arguments(Batch(step).part(rank) if rank < 3 else nothing())
        handler.update_cache_and_compute_loss(*given, features, **more)
    dcp.save(handler.distributed_state_dict(), checkpoint_id=path / "checkpoint")
    everything = whole_cache(handler)
    if rank == 0:
        torch.save((everything, handler.cache_loss.generator.state), path / "whole.pt")


def nothing():
    return {key: value[:0] for key, value in Batch(3).all.items()}


def load_checkpoint(rank, path):
    towers = Towers()
    handler = sharded_handler(towers, {"estimator": "shared", "generator": 99})
    dcp.load(handler.distributed_state_dict(), checkpoint_id=path / "checkpoint")
    everything, generator = torch.load(path / "whole.pt")
    assert whole_cache(handler) == everything
    assert torch.equal(handler.cache_loss.generator.state, generator)
    assert min(everything["age"]) == 0
    given, features, more = towers.arguments(Batch(3).part(rank))
    loss = handler.update_cache_and_compute_loss(*given, features, **more)
    assert torch.isfinite(loss)


def test_a_checkpoint_of_four_ranks_loads_on_any_number(tmp_path):
    run(tmp_path, save_checkpoint, tmp_path, ranks=4)
    for ranks in (1, 2, 3):
        run(tmp_path, load_checkpoint, tmp_path, ranks=ranks)


def with_fsdp(rank):
    """Towers that are sharded themselves: forward passes are collective, also of empty batches."""
    torch.manual_seed(0)
    query, item = (torch.nn.Linear(2, WIDTH, dtype=torch.float64) for _ in range(2))
    alone = copy.deepcopy((query, item))
    for tower in (query, item):
        fully_shard(tower, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    ours, theirs = Towers(), Towers()
    options = {"estimator": "exact_query"}
    sharded, whole = sharded_handler(ours, options), whole_handler(theirs, options)
    for step in range(4):
        batch = Batch(step)
        part = batch.part(rank)
        features = {key: part[key] for key in FIELDS}
        for tower in (query, item):
            tower.zero_grad()
        loss = sharded.update_cache_and_compute_loss(
            lambda features: item(features["x"]), query(part["y"]), item(part["x"]), features
        )
        loss.backward()
        positive = alone[1](batch.all["x"])
        expected = whole.cache_loss(
            lambda features: alone[1](features["x"]),
            alone[0](batch.all["y"]),
            positive,
            whole.cache,
            pos_features={"x": batch.all["x"]},
        )
        commit_whole(whole, expected, positive, batch)
        for tower in alone:
            tower.zero_grad()
        expected.loss.backward()
        for tower, other in zip((query, item), alone, strict=True):
            for ours_, theirs_ in zip(tower.parameters(), other.parameters(), strict=True):
                wanted = torch.zeros_like(theirs_) if theirs_.grad is None else theirs_.grad
                torch.testing.assert_close(ours_.grad.full_tensor(), wanted, rtol=1e-9, atol=1e-11)


def test_towers_that_fsdp_shards_work(tmp_path):
    run(tmp_path, with_fsdp, ranks=RANKS)


def in_a_subgroup(rank):
    """Ranks 1 and 2 share a cache; rank 0 has nothing to do with it."""
    group = dist.new_group([1, 2])
    if rank == 0:
        return
    towers = Towers()
    loss = negcache.DistributedCacheClassificationLoss(
        "embedding", ("x",), scale=towers.scale, estimator="shared", group=group
    )
    handler = negcache.CacheLossHandler(
        negcache.CacheManager(SPECS, CAPACITY), loss, "embedding", ("x",), group=group
    )
    assert loss.replicas.count == 2
    assert handler.cache.age.shape == (5,)
    # Each rank fills its own shard, and refreshes its own rows.
    corpus = {key: value[:4] for key, value in Batch(3).all.items() if key in SPECS}
    assert int(handler.prefill(towers.item, corpus, 3)) == 0
    assert int((handler.cache.age == 0).sum()) == 4
    given, features, more = towers.arguments(Batch(3).part(rank))
    handler.update_cache_and_compute_loss(*given, features, **more)
    assert float(handler.metrics["fill"]) == 0.8
    handler.refresh(lambda features: torch.full((len(features["x"]), WIDTH), 7.0 + rank), 2)
    assert int((handler.cache.data["embedding"] == 7.0 + rank).all(1).sum()) == 2
    with pytest.raises(negcache.OptionError, match="different groups"):
        negcache.CacheLossHandler(
            negcache.CacheManager(SPECS, CAPACITY),
            loss,
            "embedding",
            ("x",),
            group=dist.group.WORLD,
        )


def test_a_subgroup_has_a_cache_of_its_own(tmp_path):
    run(tmp_path, in_a_subgroup, ranks=RANKS)


def refused(rank):
    """What cannot work with shards is refused before the first step."""
    loss = negcache.DistributedCacheClassificationLoss

    def handler(cache_loss, capacity=CAPACITY, **options):
        manager = negcache.CacheManager(SPECS, capacity)
        return negcache.CacheLossHandler(manager, cache_loss, "embedding", ("x",), **options)

    plain = negcache.CacheClassificationLoss("embedding", ("x",))
    for call, error, message in (
        (lambda: loss("embedding", ("x",), retrieval_fn=len), negcache.OptionError, "that of its"),
        (
            lambda: handler(loss("embedding", ("x",)), use_cross_replica=True),
            negcache.OptionError,
            "choose one of the two",
        ),
        (lambda: handler(loss("embedding", ("x",)), 4), negcache.CapacityError, r"\[2, 2, 0\]"),
        (lambda: handler(plain, group=dist.group.WORLD), negcache.OptionError, "shares nothing"),
        (lambda: handler(plain).distributed_state_dict(), negcache.OptionError, "state_dict"),
    ):
        with pytest.raises(error, match=message):
            call()


def test_what_does_not_go_with_shards_is_refused(tmp_path):
    run(tmp_path, refused, ranks=RANKS)


def test_shards_without_a_process_group_are_refused():
    loss = negcache.DistributedCacheClassificationLoss("embedding", ("x",))
    with pytest.raises(negcache.OptionError, match=r"torch\.distributed is not initialised"):
        negcache.CacheLossHandler(negcache.CacheManager(SPECS, CAPACITY), loss, "embedding", ("x",))


def by_the_front_door(rank):
    """NegativeCacheLoss with a group makes the handler of shards, for any kind of group."""
    options = {"estimator": "exact_query", "in_batch_negatives": True}
    labels = {key: spec for key, spec in SPECS.items() if key not in ("x", "embedding")}
    towers = Towers()
    groups = (dist.group.WORLD, init_device_mesh("cpu", (RANKS,)))
    made = [
        negcache.NegativeCacheLoss(
            *(CAPACITY, {"x": SPECS["x"]}, SPECS["embedding"], towers.scale),
            labels=labels,
            group=group,
            generator=5,
        )
        for group in groups
    ]
    handlers = [sharded_handler(towers, options), *made]
    for step in range(3):
        given, features, more = towers.arguments(Batch(step).part(rank))
        losses = [handler(*given, features, **more) for handler in handlers]
        assert losses[0] == losses[1] == losses[2]
    states = [handler.state_dict() for handler in handlers]
    for key, value in states[0].items():
        assert all(torch.equal(value, state[key]) for state in states[1:]), key
    assert repr(handlers[1]).startswith(f"NegativeCacheLoss({(4, 4, 2)[rank]} of 10 slots, ")


def test_the_front_door_makes_shards(tmp_path):
    run(tmp_path, by_the_front_door, ranks=RANKS)


def one_slot_for_an_item(rank):
    """With unique_key an item has one slot in all shards, and its last row counts."""
    towers, model = Towers(), {}
    manager = negcache.CacheManager(SPECS, 60, unique_key="id")
    loss = negcache.DistributedCacheClassificationLoss(
        "embedding", ("x",), scale=towers.scale, generator=0
    )
    handler = negcache.CacheLossHandler(manager, loss, "embedding", ("x",))
    for step in range(12):
        batch = Batch(step)
        ids = np.random.default_rng(step).integers(0, 9, sum(batch.sizes)).astype(np.int32)
        batch.all["id"] = torch.from_numpy(ids)
        given, features, more = towers.arguments(batch.part(rank))
        handler.update_cache_and_compute_loss(*given, features, **more)
        model |= dict(zip(ids.tolist(), batch.all["x"].tolist(), strict=True))
        cache, rows = handler.cache, []
        written = cache.age != negcache.EMPTY
        for field in ("id", "x"):
            parts = [None] * RANKS
            dist.all_gather_object(parts, cache.data[field][written].tolist())
            rows.append([row for part in parts for row in part])
        assert sorted(rows[0]) == sorted(model)
        assert dict(zip(*rows, strict=True)) == model
    if rank == 0:
        assert written.any()
    narrow = negcache.CacheLossHandler(
        negcache.CacheManager(SPECS, 9, unique_key="id"), loss, "embedding", ("x",)
    )
    given, features, more = towers.arguments(Batch(3).part(rank))
    with pytest.raises(negcache.CapacityError, match="insert 6 rows a step"):
        narrow.update_cache_and_compute_loss(*given, features, **more)


def test_an_item_has_one_slot_in_all_shards(tmp_path):
    run(tmp_path, one_slot_for_an_item, ranks=RANKS)
