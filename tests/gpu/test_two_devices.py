"""Two processes, each with a device of its own, over NCCL: shards, and mirrored caches.

With NEGCACHE_DEVICE=cpu they are two processes of the CPU, over gloo.
"""

import os
from datetime import timedelta

import negcache_torch as negcache
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

DEVICE = os.environ.get("NEGCACHE_DEVICE", "cuda")
RANKS, WIDTH = 2, 3
SHARD = 8  # slots
OPTIONS = [
    {"estimator": "paper", "num_samples": 2},
    {"estimator": "shared", "in_batch_negatives": True, "id_key": "id", "top_k": 4},
    {"estimator": "exact_query", "in_batch_negatives": True, "staleness_correction": True},
    {"estimator": "exact_query", "group_key": "kind", "margin": 0.5, "max_staleness": 0.2},
]
SPECS = {
    "x": negcache.FieldSpec((2,), torch.float64),
    "id": negcache.FieldSpec((), torch.int32),
    "kind": negcache.FieldSpec((), torch.int64),
    "embedding": negcache.FieldSpec((WIDTH,), torch.float64),
}
PARTS = [(3, 2), (0, 4), (2, 2), (4, 1)]  # rows of each rank, step by step


class Batch:
    def __init__(self, step, device):
        self.sizes = PARTS[step % len(PARTS)]
        rng, rows = torch.Generator().manual_seed(step), sum(self.sizes)
        drawn = {
            "y": torch.randn(rows, 2, dtype=torch.float64, generator=rng),
            "x": torch.randn(rows, 2, dtype=torch.float64, generator=rng),
            "id": torch.randint(4, (rows,), dtype=torch.int32, generator=rng),
            "kind": torch.randint(3, (rows,), generator=rng),
            "noise": torch.rand(rows, 1, 2, dtype=torch.float64, generator=rng),
        }
        self.all = {key: value.to(device) for key, value in drawn.items()}

    def part(self, rank):
        return {key: value.split(self.sizes)[rank] for key, value in self.all.items()}


class Towers:
    def __init__(self, device):
        rng = torch.Generator().manual_seed(1)
        query, item = torch.randn(2, 2, WIDTH, dtype=torch.float64, generator=rng)
        scale = torch.tensor(1.5, dtype=torch.float64)
        self.parameters = [each.to(device).requires_grad_() for each in (query, item, scale)]

    def scale(self):
        return self.parameters[2]

    def network(self, features):
        return features["x"] @ self.parameters[1]

    def arguments(self, rows):
        features = {key: rows[key] for key in ("x", "id", "kind")}
        return self.network, rows["y"] @ self.parameters[0], self.network(features), features

    def descend(self, gradients):
        with torch.no_grad():
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.sub_(gradient, alpha=0.1)


def average(values):
    """Do what data-parallel training does with gradients."""
    values = [value.detach().clone() for value in values]
    for value in values:
        dist.all_reduce(value)
    return [value / RANKS for value in values]


def close(ours, theirs):
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-11)


def shards(rank, device):
    """A cache in two shards is one big cache, in loss, gradients, rows and ages."""
    for options in OPTIONS:
        ours, theirs = Towers(device), Towers(device)
        common = {"generator": 5, **options}
        sharded = negcache.CacheLossHandler(
            negcache.CacheManager(SPECS, RANKS * SHARD),
            negcache.DistributedCacheClassificationLoss(
                "embedding", ("x",), scale=ours.scale, **common
            ),
            "embedding",
            ("x",),
        ).to(device)
        whole = negcache.MultiCacheLossHandler(
            {str(each): negcache.CacheManager(SPECS, SHARD) for each in range(RANKS)},
            negcache.CacheClassificationLoss("embedding", ("x",), scale=theirs.scale, **common),
            "embedding",
            ("x",),
        ).to(device)
        for step in range(6):
            batch = Batch(step, device)
            loss = sharded.update_cache_and_compute_loss(*ours.arguments(batch.part(rank)))
            found = average([loss, *torch.autograd.grad(loss, ours.parameters)])

            network, query, positive, features = theirs.arguments(batch.all)
            # The phases: the positives of one big cache are in no order of names.
            given = (query, {"0": features, "1": features})
            retrieval = whole.retrieve(*given, pos_item_embeddings=positive)
            negative = network(retrieval.features)
            result = whole.compute_loss(query, positive, negative, retrieval)
            cut = {key: value.split(batch.sizes) for key, value in features.items()}
            whole.commit(
                result,
                dict(zip("01", positive.split(batch.sizes), strict=True)),
                {str(each): {key: cut[key][each] for key in cut} for each in range(RANKS)},
            )
            wanted = torch.autograd.grad(result.loss, theirs.parameters)
            close(found, [result.loss.detach(), *wanted])
            shard = whole.cache[str(rank)]
            assert torch.equal(sharded.cache.age, shard.age), (options, step)
            close(sharded.cache.data.values(), shard.data.values())
            ours.descend(found[1:])
            theirs.descend(wanted)
        assert {each.device for each in sharded.state_dict().values()} == {device}


def mirrored(rank, device):
    """With use_cross_replica both have the cache that one process with the whole batch has."""
    towers = Towers(device)
    handlers = [
        negcache.CacheLossHandler(
            negcache.CacheManager(SPECS, 16),
            negcache.CacheClassificationLoss("embedding", ("x",), scale=towers.scale, generator=0),
            "embedding",
            ("x",),
            use_cross_replica=replicated,
        ).to(device)
        for replicated in (True, False)
    ]
    for step in range(6):
        batch, values = Batch(step, device), []
        for handler, rows in zip(handlers, (batch.part(rank), batch.all), strict=True):
            arguments = towers.arguments(rows)
            loss = handler.update_cache_and_compute_loss(*arguments, noise=rows["noise"])
            values.append([loss.detach(), *torch.autograd.grad(loss, towers.parameters)])
        close(average(values[0]), values[1])
        ours, theirs = (handler.cache for handler in handlers)
        assert torch.equal(ours.age, theirs.age)
        close(ours.data.values(), theirs.data.values())
        towers.descend(values[1][1:])


def with_ddp(rank, device):
    """A training under DistributedDataParallel, by the front door, in bfloat16 rows."""
    torch.manual_seed(0)
    tower = torch.nn.Linear(2, WIDTH, device=device)
    parallel = torch.nn.parallel.DistributedDataParallel(tower)
    loss_fn = negcache.NegativeCacheLoss(
        RANKS * SHARD,
        {"x": negcache.FieldSpec((2,), torch.float32)},
        torch.empty(1, WIDTH, dtype=torch.bfloat16, device=device),
        group=dist.group.WORLD,
        generator=0,
    )
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.01)
    for step in range(6):
        rows = {key: value.float() for key, value in Batch(2 + 4 * step, device).part(rank).items()}
        features = {"x": rows["x"]}
        # One forward pass in a step: everything that is embedded goes in together.
        with torch.no_grad():
            retrieval = loss_fn.retrieve(tower(rows["y"]), features)
        count = len(rows["x"])
        embedded = parallel(torch.cat([rows["y"], rows["x"], retrieval.features["x"]]))
        query, positive, negative = embedded.split([count, count, len(embedded) - 2 * count])
        result = loss_fn.compute_loss(query, positive, negative, retrieval)
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()
        loss_fn.commit(result, positive, features)
        assert torch.isfinite(result.loss)
    (weight,) = average([tower.weight])
    torch.testing.assert_close(weight, tower.weight.detach())  # DDP kept both alike
    assert int((loss_fn.cache.age != negcache.EMPTY).sum()) == SHARD


def work(rank, store, function):
    device = torch.device(DEVICE, rank) if DEVICE == "cuda" else torch.device(DEVICE)
    if DEVICE == "cuda":
        torch.cuda.set_device(device)
    torch.set_num_threads(1)
    dist.init_process_group(
        "nccl" if DEVICE == "cuda" else "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=120),
    )
    function(rank, device)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.skipif(
    DEVICE == "cuda" and torch.cuda.device_count() < RANKS,
    reason=f"NCCL needs two GPUs, and here is {torch.cuda.device_count()}: shards, mirrored caches "
    "and DistributedDataParallel were not run",
)
@pytest.mark.parametrize("function", [shards, mirrored, with_ddp])
def test_two_devices(function, tmp_path):
    mp.start_processes(
        work, (str(tmp_path / "store"), function), nprocs=RANKS, start_method="spawn"
    )
