"""A model for many wrappers: two towers and a cache, whose forward pass is a step."""

import negcache_torch as negcache
import torch
from torch import nn

WIDTH, CAPACITY = 4, 8
STATE = {
    "handler.cache_loss.generator.state",
    "handler.tables.cache_cache.age",
    "handler.tables.cache_cache.field_embedding",
    "handler.tables.cache_cache.field_flag",
    "handler.tables.cache_cache.field_half",
    "handler.tables.cache_cache.field_id",
    "handler.tables.cache_cache.field_x",
}


class Model(nn.Module):
    """Two towers and a cache with a field of each kind of dtype; a forward pass is a step."""

    def __init__(self, *, generator=0, kind="CacheClassificationLoss", replicated=False, **options):
        super().__init__()
        self.query, self.item = nn.Linear(3, WIDTH), nn.Linear(3, WIDTH)
        self.register_buffer("steps", torch.zeros(()))
        dtypes = {"x": "float32", "half": "bfloat16", "id": "uint16", "flag": "bool"}
        specs = {
            key: negcache.FieldSpec((3,) if key == "x" else (), dtype)
            for key, dtype in dtypes.items()
        }
        specs["embedding"] = negcache.FieldSpec((WIDTH,), "float32")
        self.handler = negcache.CacheLossHandler(
            negcache.CacheManager(specs, CAPACITY),
            getattr(negcache, kind)("embedding", ("x",), scale=2.0, generator=generator, **options),
            use_cross_replica=replicated,
        )

    def network(self, features):
        return self.item(features["x"].to(self.item.weight.dtype))

    def arguments(self, x):
        """Return what a step takes."""
        features = {
            "x": x,
            "half": x[:, 0].bfloat16(),
            "id": (x[:, 1].abs() * 100).to(torch.uint16),
            "flag": x[:, 2] > 0,
        }
        queries = self.query(x.flip(1).to(self.query.weight.dtype))
        return self.network, queries, self.network(features), features

    def forward(self, x):
        return self.handler.update_cache_and_compute_loss(*self.arguments(x))

    def reset_parameters(self):
        """Do what FSDP asks of modules that were made on "meta"."""
        self.steps.zero_()

    def state(self):
        """Return a copy of all the handler's own."""
        return {key: value.clone() for key, value in self.state_dict().items() if key in STATE}


def batch(seed, rows=3):
    return torch.randn(rows, 3, generator=torch.Generator().manual_seed(seed))


def trained(steps=4, **options):
    torch.manual_seed(0)
    model = Model(**options)
    for seed in range(steps):
        train_step(model, seed)
    return model


def train_step(model, seed):
    model.zero_grad()
    loss = model(batch(seed))
    loss.backward()
    with torch.no_grad():
        for each in model.parameters():
            each.sub_(each.grad, alpha=0.1)
    return loss.detach()


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert ours[key].dtype == value.dtype, key
        assert torch.equal(ours[key], value), key


def assert_goes_on_alike(model, other):
    assert torch.equal(train_step(model, 9), train_step(other, 9))
    assert_same(model.state(), other.state())
