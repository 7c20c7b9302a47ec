"""What is PyTorch's own: modules, devices, copies, checkpoints, autograd, writes in place."""

import copy

import negcache_torch as negcache
import pytest
import torch
from negcache_torch import _replicas
from negcache_torch._backend import TORCH
from negcache_torch._generator import BufferGenerator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.tensorboard import SummaryWriter

WIDTH = 4


def handler_of(capacity=8, *, dtype=torch.float32, generator=0, scale=None, **options):
    specs = {
        "tokens": negcache.FieldSpec((3,), torch.int64),
        "user.id": negcache.FieldSpec((), torch.uint16),
        "embedding": negcache.FieldSpec((WIDTH,), dtype),
    }
    return negcache.CacheLossHandler(
        negcache.CacheManager(specs, capacity),
        negcache.CacheClassificationLoss(
            "embedding", ("tokens",), scale=scale, generator=generator
        ),
        embedding_key="embedding",
        data_keys=("tokens",),
        **options,
    )


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, WIDTH)

    def forward(self, features):
        return self.embedding(features["tokens"]).mean(1)


def batch(seed, rows=3):
    generator = torch.Generator().manual_seed(seed)
    features = {
        "tokens": torch.randint(0, 20, (rows, 3), generator=generator),
        "user.id": torch.randint(0, 9, (rows,), generator=generator).to(torch.uint16),
    }
    return torch.randn(rows, WIDTH, generator=generator), features


def step(handler, tower, seed, rows=3):
    query, features = batch(seed, rows)
    return handler.update_cache_and_compute_loss(tower, query, tower(features), features)


def tower_of(seed=0):
    torch.manual_seed(seed)
    return Tower()


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert torch.equal(ours[key], value), key


def test_every_bit_of_state_is_in_the_state_dict(tmp_path):
    """Save, load into a new handler from a file, go on: bit for bit as if never stopped."""
    tower, handler = tower_of(), handler_of()
    assert set(handler.state_dict()) == {
        "cache_loss.generator.state",
        "tables.cache_cache.age",
        "tables.cache_cache.field_embedding",
        "tables.cache_cache.field_tokens",
        "tables.cache_cache.field_user%2Eid",
    }
    for seed in range(4):
        step(handler, tower, seed)
    torch.save(handler.state_dict(), tmp_path / "handler.pt")
    resumed = handler_of(generator=99)
    resumed.load_state_dict(torch.load(tmp_path / "handler.pt", weights_only=True))
    for seed in range(4, 8):
        assert torch.equal(step(resumed, tower, seed), step(handler, tower, seed))
        assert_same(resumed.state_dict(), handler.state_dict())


def test_a_copy_shares_nothing():
    tower, handler = tower_of(), handler_of()
    step(handler, tower, 0)
    twin = copy.deepcopy(handler)
    before = {key: value.clone() for key, value in twin.state_dict().items()}
    ours = step(handler, tower, 1)
    assert_same(twin.state_dict(), before)
    assert torch.equal(step(twin, tower, 1), ours)
    assert_same(twin.state_dict(), handler.state_dict())


def test_tables_are_written_in_place_without_a_copy():
    """No allocation of a commit comes near the table, and the tables stay where they are."""
    capacity = 200_000
    handler = handler_of(capacity)
    table_bytes = capacity * WIDTH * 4
    age_bytes = capacity * 4
    tower = tower_of()
    query, features = batch(0)
    positives = tower(features)
    pointers = {key: value.data_ptr() for key, value in handler.state_dict().items()}
    retrieval = handler.retrieve(query, features)
    result = handler.compute_loss(query, positives, tower(retrieval.features), retrieval)
    with torch.profiler.profile(profile_memory=True) as profile:
        handler.commit(result, positives, features)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert 0 < largest <= 2 * age_bytes < table_bytes  # int64 keys of the ages are the most
    assert pointers == {key: value.data_ptr() for key, value in handler.state_dict().items()}
    assert int((handler.cache.age == 0).sum()) == 3


def test_backward_after_the_commit():
    """The cache is written between forward and backward: gradients must not notice."""
    tower, handler = tower_of(), handler_of(4)
    for seed in range(3):
        step(handler, tower, seed)
    query, features = batch(3)
    query.requires_grad_()
    twin = copy.deepcopy(handler)
    loss = handler.update_cache_and_compute_loss(tower, query, tower(features), features)
    ours = torch.autograd.grad(loss, [query, *tower.parameters()])
    retrieval = twin.retrieve(query, features)
    negatives = tower(retrieval.features)
    uncommitted = twin.compute_loss(query, tower(features), negatives, retrieval).loss
    for mine, theirs in zip(
        ours, torch.autograd.grad(uncommitted, [query, *tower.parameters()]), strict=True
    ):
        assert torch.equal(mine, theirs)
    assert not any(value.requires_grad for value in handler.state_dict(keep_vars=True).values())


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_rows_of_a_manager_are_constants_too(dtype):
    """Otherwise each update would keep the graphs of all steps before."""
    specs = {"e": negcache.FieldSpec((2,), dtype)}
    manager = negcache.CacheManager(specs, 4).storing("e")
    rows = torch.ones(2, 2, requires_grad=True) * 2
    cache = manager.update_cache(manager.init_cache(), new_items={"e": rows})
    cache = manager.update_cache(
        cache, updated_item_data={"e": rows}, updated_item_indices=torch.tensor([1, 3])
    )
    assert not any(table.requires_grad for table in cache.data.values())


def test_the_step_reads_no_value_on_the_host():
    """On the meta device there are no values: any synchronisation or branch on data would raise."""
    handler = handler_of(300, scale=2.0).to("meta")
    assert {value.device.type for value in handler.state_dict().values()} == {"meta"}
    tower = tower_of().to("meta")
    for rows in (3, 0, 5):
        features = {
            "tokens": torch.zeros((rows, 3), dtype=torch.int64, device="meta"),
            "user.id": torch.zeros(rows, dtype=torch.uint16, device="meta"),
        }
        query = torch.zeros((rows, WIDTH), device="meta")
        loss = handler.update_cache_and_compute_loss(tower, query, tower(features), features)
        loss.backward()
        assert loss.device.type == "meta"


def test_trained_scales_and_transforms_are_parameters():
    class Temperature(nn.Module):
        def __init__(self):
            super().__init__()
            self.log = nn.Parameter(torch.zeros(()))

        def forward(self, scores):
            return scores * self.log.exp()

    scale = nn.Parameter(torch.tensor(3.0))
    loss = negcache.CacheClassificationLoss(
        "embedding", ("tokens",), score_transform=Temperature(), scale=scale
    )
    assert {name for name, _ in loss.named_parameters()} == {"scale", "score_transform.log"}
    cache = negcache.NegativeCache(
        {"embedding": torch.randn(5, WIDTH), "tokens": torch.zeros((5, 3), dtype=torch.int64)},
        torch.zeros(5, dtype=torch.int32),
    )
    query, features = batch(0)
    tower = tower_of()
    loss(tower, query, tower(features), cache).loss.backward()
    assert scale.grad.abs() > 0
    assert loss.score_transform.log.grad.abs() > 0


def test_retrieval_records_nothing_for_backward():
    recorded = []

    def transform(scores):
        recorded.append(torch.is_grad_enabled())
        return scores

    tower, handler = tower_of(), handler_of()
    handler.cache_loss.score_transform = transform
    query, features = batch(0)
    query.requires_grad_()
    retrieval = handler.retrieve(query, features)
    assert recorded
    assert not any(recorded)
    handler.compute_loss(query, tower(features), tower(retrieval.features), retrieval)
    assert recorded[-1]


def test_tensors_on_another_device_are_refused():
    handler, tower = handler_of(), tower_of()
    query, features = batch(0)
    features["user.id"] = features["user.id"].to("meta")
    with pytest.raises(
        negcache.DeviceError, match=r"\['user.id'\] is on meta and the cache on cpu"
    ):
        handler.update_cache_and_compute_loss(tower, query, tower(features), features)


def test_generator_is_splitmix64():
    """Known answers of the published generator."""

    def outputs(seed):
        return [int(value) % 2**64 for value in BufferGenerator(seed).bits(3, torch.device("cpu"))]

    assert outputs(0) == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert outputs(1234567) == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


def test_generator_goes_on_where_it_stopped():
    cpu = torch.device("cpu")
    one, two = BufferGenerator(5), BufferGenerator(5)
    parts = torch.cat([one.uniform((2, 3), cpu).flatten(), one.uniform((4,), cpu)])
    assert torch.equal(parts, two.uniform((10,), cpu))
    assert parts.dtype == torch.float64
    assert ((parts >= 0) & (parts < 1)).all()


def test_generator_follows_the_frameworks_seed():
    def draw(generator):
        return BufferGenerator(generator).state.item()

    torch.manual_seed(1)
    first = draw(None)
    torch.manual_seed(1)
    assert draw(None) == first
    assert draw(None) != first
    assert draw(torch.Generator().manual_seed(3)) == draw(torch.Generator().manual_seed(3))
    with pytest.raises(negcache.KindError, match=r"an int seed, or a torch\.Generator"):
        BufferGenerator(0.5)


def test_modules_of_several_caches_and_awkward_names():
    names = ("a.b", "items", "a%2Eb")
    specs = {"forward": negcache.FieldSpec((2,), "float32"), "age": negcache.FieldSpec((), "int64")}
    handler = negcache.MultiCacheLossHandler(
        {name: negcache.CacheManager(specs, 3) for name in names},
        negcache.CacheClassificationLoss("forward", ("age",), generator=0),
        embedding_key="forward",
        data_keys=("age",),
    )
    assert set(handler.cache) == set(names)
    assert len(handler.state_dict()) == 3 * 3 + 1


def test_scores_stay_wide_inside_autocast():
    """Half-precision scores would shift the log-partition in the third digit."""
    tower, losses = tower_of(), []
    for enabled in (False, True):
        handler = handler_of(capacity=500, scale=5.0)
        for seed in range(3):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                loss = step(handler, tower, seed)
        assert loss.dtype == torch.float32
        losses.append(loss)
    assert torch.equal(*losses)


@pytest.mark.parametrize("written", [True, False], ids=["full", "a slot empty"])
def test_the_readout_is_attention_tile_by_tile(written):
    table, query = torch.randn(1000, 5), torch.randn(3, 5)
    age = torch.zeros(1000, dtype=torch.int32)
    age[7] = 0 if written else negcache.EMPTY
    cache = negcache.NegativeCache({"x": table, "embedding": table}, age)
    loss = negcache.CacheClassificationLoss(
        "embedding", ("x",), estimator="exact_query", tile_bytes=1, generator=0
    )
    found = loss.retrieve(query, cache).readout
    scores = (query @ table.T).masked_fill(age == negcache.EMPTY, -torch.inf)
    torch.testing.assert_close(found, torch.softmax(scores, 1) @ table)


@pytest.mark.parametrize("spread", [1.0, 100.0, 1e6])
def test_exponentials_do_not_depend_on_how_they_are_made(spread):
    """Of powers of two, as exp is slow where it underflows; also where no number is left."""
    left, right = spread * torch.randn(9, 40), spread * torch.randn(1, 40).clamp(min=0)
    left[0], right[0, 0] = -torch.inf, torch.finfo().min
    expected = torch.exp(left.double() - right.double()).clamp(max=torch.finfo().max)
    left[:, 0] = -torch.inf
    expected[:, 0] = 0.0
    found = TORCH.xp.exp_difference(left, right)
    assert found is left
    tolerance = 1e-6 * max(1.0, spread)  # of the float32 arguments
    kept = expected < 1e30
    torch.testing.assert_close(found[kept].double(), expected[kept], rtol=tolerance, atol=1e-30)


def test_rows_of_one_number_are_sent_whatever_their_strides():
    one = torch.arange(8).reshape(1, 8).unbind(1)[3]
    for rows, strides in ((torch.arange(4).reshape(1, 4).T, (1, 4)), (one, (8,))):
        assert rows.is_contiguous()
        assert rows.stride() == strides
        (back,) = _replicas._unpack(_replicas._pack([rows]), [rows])
        assert torch.equal(back, rows)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # what TensorBoard imports
def test_metrics_are_scalars_that_tensorboard_takes(tmp_path):
    handler, tower = handler_of(), tower_of()
    with SummaryWriter(tmp_path) as writer:
        for number in (1, 2):
            step(handler, tower, number)
            for name, value in handler.metrics.items():
                writer.add_scalar(f"cache/{name}", value, number)
    accumulator = EventAccumulator(str(tmp_path)).Reload()
    found = {tag: accumulator.Scalars(tag) for tag in accumulator.Tags()["scalars"]}
    assert {tag: events[-1].value for tag, events in found.items()} == {
        f"cache/{name}": pytest.approx(float(value)) for name, value in handler.metrics.items()
    }
    assert {event.step for events in found.values() for event in events} == {1, 2}
