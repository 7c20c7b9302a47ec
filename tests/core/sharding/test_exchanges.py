"""The calculator says what is really sent: bytes of each exchange, counted in real processes."""

import negcache_torch as negcache
import pytest
import torch
import torch.distributed as dist
from ranks import run

from negcache_core import scaling

WIDTH, OWN = 6, 4  # of each rank's queries
ID = {"id_bytes": 4}
OPTIONS = {  # of the loss -> what the calculator is told of it
    "paper": ({}, {}),
    "two draws": ({"num_samples": 2}, {"num_samples": 2}),
    "ids": ({"id_key": "id"}, ID),
    "two ids": (
        {"id_keys": ("id", "owner"), "in_batch_negatives": True, "estimator": "shared"},
        {
            "id_bytes": 12,
            "id_fields": 2,
            "in_batch_negatives": True,
            "estimator": "shared",
        },
    ),
    "group and margin": (
        {"group_key": "owner", "margin": 0.1, "in_batch_negatives": True},
        {"group_bytes": 8, "margin": True, "in_batch_negatives": True},
    ),
    "in-batch": ({"in_batch_negatives": True}, {"in_batch_negatives": True}),
    "in-batch, ids and frequencies": (
        {"in_batch_negatives": True, "id_key": "id", "log_frequency_key": "log_q"},
        {"in_batch_negatives": True, "log_frequency_bytes": 4, **ID},
    ),
    "top-k": ({"top_k": 3, "num_samples": 2}, {"top_k": 3, "num_samples": 2}),
    "shared": ({"estimator": "shared"}, {"estimator": "shared"}),
    "shared, top-k, all keys": (
        {"estimator": "shared", "top_k": 5, "id_key": "id", "log_frequency_key": "log_q"},
        {"estimator": "shared", "top_k": 5, "log_frequency_bytes": 4, **ID},
    ),
    "exact query": (
        {"estimator": "exact_query", "in_batch_negatives": True, "num_samples": 3},
        {"estimator": "exact_query", "in_batch_negatives": True, "num_samples": 3},
    ),
}
DTYPES = [("float32", "float32"), ("bfloat16", "float32"), ("float64", "float32"), ("int8", "float32")]


class Counter:
    """Stands in for torch.distributed's exchanges: what this rank sends to others, in order.

    all_gather of n bytes: n for each other rank. all_to_all_single: the rows for other ranks.
    """

    def __init__(self):
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        self.sent, self.routed = [], []
        self._gather, self._route = dist.all_gather, dist.all_to_all_single
        dist.all_gather, dist.all_to_all_single = self.gather, self.route

    def gather(self, parts, array, **more):
        self.sent.append((self.count - 1) * array.numel() * array.element_size())
        return self._gather(parts, array, **more)

    def route(self, received, rows, expected, out, **more):
        there = sum(out) - out[self.rank]
        self.sent.append(there * rows.shape[1:].numel() * rows.element_size())
        self.routed.append(there)
        return self._route(received, rows, expected, out, **more)

    def take(self):
        found = self.sent, self.routed
        self.sent, self.routed = [], []
        return found


def handler_of(capacity, stored, options):
    specs = {
        "x": negcache.FieldSpec((3,), torch.float32),
        "id": negcache.FieldSpec((), torch.int32),
        "owner": negcache.FieldSpec((), torch.int64),
        "log_q": negcache.FieldSpec((), torch.float32),
        "embedding": negcache.FieldSpec((WIDTH,), getattr(torch, stored)),
    }
    return negcache.CacheLossHandler(
        negcache.CacheManager(specs, capacity),
        negcache.DistributedCacheClassificationLoss("embedding", ("x",), generator=3, **options),
        embedding_key="embedding",
        data_keys=("x",),
    )


def count_steps(counter, capacity, dtypes, options, own=OWN):
    """Return what each of a few steps sends; the first one also compares options."""
    stored, fresh = dtypes
    handler, found = handler_of(capacity, stored, options), []
    tower = torch.nn.Linear(3, WIDTH, dtype=getattr(torch, fresh))
    for step in range(3):
        x = torch.randn(own, 3)
        features = {
            "x": x,
            "id": torch.arange(own, dtype=torch.int32) + own * (3 * counter.rank + step),
            "owner": torch.zeros(own, dtype=torch.int64),
            "log_q": torch.randn(own),
        }
        loss = handler.update_cache_and_compute_loss(
            lambda features: tower(features["x"].to(tower.weight.dtype)),
            torch.randn(own, WIDTH, dtype=tower.weight.dtype),
            tower(x.to(tower.weight.dtype)),
            features,
        )
        loss.backward()
        found.append(counter.take())
    return found[1:]


def check_all(rank):
    torch.manual_seed(rank)
    counter = Counter()
    for capacity, every in ((40, DTYPES), (400, DTYPES[:1])):  # which changes nothing that is sent
        for dtypes in every:
            for name, (options, told) in OPTIONS.items():
                for sent, routed in count_steps(counter, capacity, dtypes, options):
                    check_step(counter, capacity, dtypes, told, name, sent, routed)


def check_step(counter, capacity, dtypes, told, name, sent, routed):
    stored, fresh = dtypes

    def formula(elsewhere):
        found = scaling(
            capacity,
            WIDTH,
            batch_size=OWN * counter.count,
            feature_bytes=12,
            world_size=counter.count,
            dtype=stored,
            tower_dtype=fresh,
            draws_elsewhere=elsewhere,
            **told,
        )
        return found.sent

    # Which shard serves a draw is chance: those that this rank served, and those that it drew.
    kinds = list(formula(0))
    routes = [kind for kind in kinds if kind in ROUTES]
    rows = dict(zip(routes, routed, strict=True))
    expected = {
        **formula(rows["drawn rows"]),
        "fresh rows": formula(rows["fresh rows"])["fresh rows"],
    }
    assert dict(zip(kinds, sent, strict=True)) == expected, (name, dtypes, capacity)


ROUTES = {  # the exchanges in which each pair of ranks has rows of its own
    *("best scores", "best slots", "readout", "drawn rows", "fresh rows"),
    *("gradients of rows", "gradients of positives"),
}


def unequal_parts(rank):
    """The formula for parts that are all as large as the largest is an upper bound."""
    torch.manual_seed(rank)
    counter, options = Counter(), {"estimator": "shared", "in_batch_negatives": True}
    bound = scaling(
        40, WIDTH, batch_size=8, feature_bytes=12, world_size=2, draws_elsewhere=4, **options
    )
    for sent, _ in count_steps(counter, 40, DTYPES[0], options, own=(1, 4)[rank]):
        for kind, size in zip(bound.sent, sent, strict=True):
            assert size <= bound.sent[kind], kind
        # Gathers of rows are padded to the largest part.
        assert sent[1] == bound.sent["queries"]


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_exchange_sends_what_the_formula_says(tmp_path, ranks):
    run(tmp_path, check_all, ranks=ranks)


def test_unequal_parts_send_no_more_than_equal_ones_of_the_largest(tmp_path):
    run(tmp_path, unequal_parts, ranks=2)
