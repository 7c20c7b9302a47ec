"""Virtual devices: a cache in shards is the one big cache, in loss, gradient, state and checkpoint.

The number of devices is settled when JAX starts, so cases run this file as a program: one process
for as many as there can be.
"""

import functools
import os
import sys
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp
import negcache_jax as negcache
import numpy as np
import orbax.checkpoint as ocp
import programs
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from negcache_jax._replicas import MeshAxis
from packaging.version import Version

from negcache_core.sharding.replicas import Route

WIDTH, ROWS, SLOTS = 3, 2, 6  # on each device
PAPER = [
    {"estimator": "paper"},
    {"estimator": "paper", "num_samples": 2, "in_batch_negatives": True},
    {"estimator": "paper", "top_k": 12, "id_key": "id"},
]
SHARED = [
    {"estimator": "shared", "id_key": "id", "in_batch_negatives": True},
    {"estimator": "shared", "top_k": 8, "log_frequency_key": "log_q", "num_samples": 2},
    {"estimator": "shared", "staleness_correction": True, "id_key": "id"},
    {"estimator": "shared", "id_keys": ("id", "owner"), "margin": 0.2, "in_batch_negatives": True},
]
EXACT_QUERY = [
    {
        "estimator": "exact_query",
        "in_batch_negatives": True,
        "log_frequency_key": "log_q",
        "staleness_correction": True,
    },
    {"estimator": "exact_query", "id_key": "id", "num_samples": 2},
    {"estimator": "exact_query", "group_key": "owner", "margin": 0.5, "in_batch_negatives": True},
]
FIELDS = ("x", "id", "owner", "log_q")
SPECS = {
    "x": negcache.FieldSpec((2,), "float64"),
    "id": negcache.FieldSpec((), "uint8"),
    "owner": negcache.FieldSpec((), "int32"),
    "log_q": negcache.FieldSpec((), "float32"),
    "embedding": negcache.FieldSpec((WIDTH,), "float64"),
}


def mesh_of(devices, axis="data"):
    return jax.make_mesh((devices,), (axis,), axis_types=(AxisType.Auto,))


def close(ours, theirs):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-11), ours, theirs)


def batch_of(step, devices):
    rng, rows = np.random.default_rng(step), ROWS * devices
    return {
        "y": rng.normal(size=(rows, 2)),
        "x": rng.normal(size=(rows, 2)),
        "id": rng.integers(0, 9, rows).astype(np.uint8),
        "owner": rng.integers(0, 3, rows).astype(np.int32),
        "hard_id": rng.integers(0, 9, (rows, 2)).astype(np.uint8),
        "hard_owner": rng.integers(0, 3, (rows, 2)).astype(np.int32),
        "log_q": rng.normal(size=rows).astype(np.float32),
        "hard": rng.normal(size=(rows, 2, 2)),
        "weight": rng.random(rows) * 2,
    }


def weights_of(seed):
    query, item = jax.random.normal(jax.random.key(seed), (2, 2, WIDTH))
    return {"query": query, "item": item, "scale": jnp.asarray(1.5, "float64")}


def item_network(weights, limit=np.inf):
    def embed(features):
        x = features["x"]
        return jnp.where(x[:, :1] > limit, np.nan, x @ weights["item"])

    return embed


def handler_of(weights, options, capacity, managers=None, **more):
    """Make the handler in the differentiated function, as its scale is trained."""
    distributed = managers is None
    kind = negcache.DistributedCacheClassificationLoss
    loss = (kind if distributed else negcache.CacheClassificationLoss)(
        "embedding", ("x",), scale=weights["scale"], **options
    )
    fields = {"embedding_key": "embedding", "data_keys": ("x",), **more}
    if distributed:
        return negcache.CacheLossHandler(negcache.CacheManager(SPECS, capacity), loss, **fields)
    return negcache.MultiCacheLossHandler(managers, loss, **fields)


def arguments_of(weights, batch, options):
    features = {key: batch[key] for key in FIELDS}
    # Where drawn rows are shared, one that is not finite is left out, on every device.
    network = item_network(weights, np.inf if options.get("estimator", "paper") == "paper" else 1.0)
    given = network, batch["y"] @ weights["query"], item_network(weights)(features)
    more = {
        "hard_negative_embeddings": batch["hard"] @ weights["item"],
        "hard_negative_features": {"id": batch["hard_id"], "owner": batch["hard_owner"]},
        "sample_weight": batch["weight"],
    }
    return given, features, more


def sharded_step(mesh, options, *, axis="data", check_vma=True, capacity=None, **more):
    capacity = SLOTS * mesh.size if capacity is None else capacity
    handler = handler_of({"scale": 1.0}, {**options, "group": axis}, capacity)
    specs = handler.specs()

    def loss_of(weights, state, batch):
        own = handler_of(weights, {**options, "group": axis}, capacity, group=axis)
        given, features, extra = arguments_of(weights, batch, options)
        loss, after = own.update_cache_and_compute_loss(state, *given, features, **extra)
        return jax.lax.pmean(loss, axis), after

    def step(weights, state, batch):
        both = jax.value_and_grad(loss_of, has_aux=True)
        (loss, state), gradients = both(weights, state, batch)
        return loss, state, jax.lax.pmean(gradients, axis)

    mapped = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(P(), specs, P(axis)),
        out_specs=(P(), specs, P()),
        check_vma=check_vma,
        **more,
    )
    return handler, mapped


def whole_step(options, devices):
    managers = {str(r): negcache.CacheManager(SPECS, SLOTS) for r in range(devices)}

    def loss_of(weights, state, batch):
        bound = handler_of(weights, options, None, managers).bind(state)
        given, features, more = arguments_of(weights, batch, options)
        # The phases, as the positives of one big cache are in no order of names.
        result = bound.cache_loss(*given, bound.cache, pos_features=features, **more)
        cut = {key: jnp.split(value, devices) for key, value in features.items()}
        bound.commit(
            result,
            dict(zip(managers, jnp.split(given[2], devices), strict=True)),
            {name: {key: cut[key][int(name)] for key in cut} for name in managers},
        )
        return result.loss, bound.state

    return handler_of({"scale": 1.0}, options, None, managers), jax.value_and_grad(
        loss_of, has_aux=True
    )


def every_option(options, *, check_vma):
    devices = jax.device_count()
    for each in options:
        mesh = mesh_of(devices)
        sharded, ours = sharded_step(mesh, each, check_vma=check_vma)
        whole, theirs = whole_step(each, devices)
        ours, theirs = jax.jit(ours), jax.jit(theirs)
        weights, key = weights_of(0), jax.random.key(5)
        state, expected = sharded.init(key), whole.init(key)
        state = jax.device_put(state, sharded.shardings(mesh))
        for number in range(6):
            batch = batch_of(number, devices)
            loss, state, gradients = ours(weights, state, batch)
            (wanted, expected), descent = theirs(weights, expected, batch)
            close(loss, wanted)
            close(gradients, descent)
            caches = [expected.caches[str(r)] for r in range(devices)]
            joined = jax.tree.map(lambda *parts: jnp.concatenate(parts), *caches)
            np.testing.assert_array_equal(state.caches["cache"].age, joined.age)
            close(state.caches["cache"].data, joined.data)
            np.testing.assert_array_equal(*map(jax.random.key_data, (state.key, expected.key)))
            weights = jax.tree.map(lambda w, g: w - 0.1 * jnp.clip(g, -1, 1), weights, descent)
        assert float(loss) > 0
        assert (state.caches["cache"].age > 0).any()


def paper():
    every_option(PAPER, check_vma=True)


def shared():
    every_option(SHARED, check_vma=True)


def exact_query():
    every_option(EXACT_QUERY, check_vma=True)


def unchecked():
    """Without shard_map's checks, where a pmean has another derivative."""
    every_option([SHARED[0], EXACT_QUERY[1]], check_vma=False)


def donated():
    """All steps run one program; tables are written where they are, and stay sharded."""
    mesh, compiled = mesh_of(8), []
    handler, mapped = sharded_step(mesh, {"estimator": "shared"}, capacity=8 * 1024)
    step = jax.jit(mapped, donate_argnums=1)
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **about: "backend_compile" in event and compiled.append(about)
    )
    shardings = handler.shardings(mesh)
    state = jax.jit(handler.init, out_shardings=shardings)(jax.random.key(0))

    def pointers(state):
        shards = state.caches["cache"].data["embedding"].addressable_shards
        return [shard.data.unsafe_buffer_pointer() for shard in shards]

    before, weights = pointers(state), weights_of(0)
    put = functools.partial(jax.device_put, device=NamedSharding(mesh, P("data")))
    weights = jax.device_put(weights, NamedSharding(mesh, P()))
    for number in range(4):
        batch = jax.tree.map(put, batch_of(number % 3, 8))
        loss, state, gradients = step(weights, state, batch)
        weights = jax.tree.map(lambda w, g: w - 0.1 * g, weights, gradients)
        if not number:
            assert compiled
            compiled.clear()
    assert not compiled
    assert pointers(state) == before
    for array, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True):
        assert array.sharding.is_equivalent_to(sharding, array.ndim)
    shards = state.caches["cache"].age.addressable_shards
    assert {shard.data.shape for shard in shards} == {(1024,)}
    assert [int((shard.data != negcache.EMPTY).sum()) for shard in shards] == [4 * ROWS] * 8
    assert float(loss) > 0


def two_axes():
    """The shards may lie along several axes of a mesh, and explicit ones."""
    mesh = jax.make_mesh((2, 2), ("a", "b"))
    line = mesh_of(4)
    put = functools.partial(jax.device_put, device=NamedSharding(mesh, P(("a", "b"))))
    handler, step = sharded_step(mesh, {"estimator": "shared"}, axis=("a", "b"))
    flat_handler, flat = sharded_step(line, {"estimator": "shared"})
    state = other = handler.init(jax.random.key(0))
    state = jax.device_put(state, handler.shardings(mesh))
    other = jax.device_put(other, flat_handler.shardings(line))
    for number in range(3):
        batch = batch_of(number, 4)
        loss, state, gradients = jax.jit(step)(weights_of(0), state, jax.tree.map(put, batch))
        wanted, other, descent = jax.jit(flat)(weights_of(0), other, batch)
        close((loss, gradients, state.caches), (wanted, descent, other.caches))


def front_door():
    """NegativeCacheLoss with a mesh, or the name of its axis, makes the handler of shards."""
    mesh, devices = mesh_of(4), 4
    labels = {key: spec for key, spec in SPECS.items() if key not in ("x", "embedding")}
    options = {"estimator": "exact_query", "in_batch_negatives": True}
    by_hand = handler_of({"scale": 1.5}, {**options, "group": "data"}, SLOTS * devices)
    found = []
    made = [
        negcache.NegativeCacheLoss(
            *(SLOTS * devices, {"x": SPECS["x"]}, SPECS["embedding"], 1.5),
            labels=labels,
            group=group,
        )
        for group in (mesh, "data")
    ]
    for handler in (by_hand, *made):

        def step(state, batch, handler=handler):
            given, features, more = arguments_of(weights_of(0), batch, {})
            loss, state = handler(state, *given, features, **more)
            return jax.lax.pmean(loss, "data"), state

        specs = handler.specs()
        mapped = jax.jit(
            jax.shard_map(step, mesh=mesh, in_specs=(specs, P("data")), out_specs=(P(), specs))
        )
        state = jax.device_put(handler.init(jax.random.key(0)), handler.shardings(mesh))
        for number in range(3):
            loss, state = mapped(state, batch_of(number, devices))
        found.append((loss, state.caches))
    for ours in found[1:]:
        jax.tree.map(np.testing.assert_array_equal, ours, found[0])


def verbs():
    """Rows of every dtype reach those who drew them, bit for bit, and no others do."""
    mesh, count, own = mesh_of(4), 4, 3
    owner = jnp.asarray(np.random.default_rng(0).integers(0, count, count * own))
    dtypes = ["bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "int64", "uint64"]
    dtypes += ["float16", "bfloat16", "float32", "float64"]

    over_devices = functools.partial(
        jax.shard_map, mesh=mesh, in_specs=P("data"), out_specs=P("data")
    )

    @jax.jit  # otherwise every operation would be compiled by itself
    @over_devices
    def serve(tables):
        replicas = MeshAxis("data")
        route = Route(owner, replicas.entries(owner), (own,) * count)
        rows = replicas.serve([table[0] for table in tables], route)
        back = replicas.give_back(rows, route)
        return rows, [each[None] for each in back]

    rng, tables, wanted = np.random.default_rng(1), [], []
    for dtype in dtypes:
        table = rng.integers(0, 99, (count, count * own, 2)).astype(jnp.dtype(dtype))
        mine = np.asarray(owner)[None, :] == np.arange(count)[:, None]
        if "float" in dtype:
            table[~mine] = np.nan  # what a replica makes of a draw that is not its own
            table[mine, 0] = -np.inf
            table[mine, 1] *= -1  # some are -0.0
        tables.append(jnp.asarray(table))
        wanted.append(table[mine.argmax(0), np.arange(count * own)])
    rows, back = serve(tables)
    for row, returned, want, dtype in zip(rows, back, wanted, dtypes, strict=True):
        assert row.dtype == jnp.dtype(dtype)
        assert np.asarray(row).tobytes() == want.tobytes(), dtype
        for each in returned:
            assert np.asarray(each).tobytes() == want.tobytes(), dtype

    @jax.jit
    @over_devices
    def gradient(rows, factors):
        replicas = MeshAxis("data")
        return jax.grad(
            lambda rows: (factors[0] * replicas.gather_fresh(rows, (own,) * count)).sum()
        )(rows)

    factors = rng.normal(size=(count, count * own))
    close(gradient(jnp.ones(count * own), factors), factors.sum(axis=0))


def mistakes():
    mesh, batch, weights = mesh_of(4), batch_of(0, 4), weights_of(0)
    handler, step = sharded_step(mesh, {"top_k": 4 * 5})
    with pytest.raises(negcache.OptionError, match=r"Choose 4 times a divisor of 6\."):
        jax.eval_shape(step, weights, handler.init(jax.random.key(0)), batch)
    _, step = sharded_step(mesh, {})
    other = handler_of(weights, {}, 8).init(jax.random.key(0))
    with pytest.raises(negcache.ShapeError, match=r"2 slots on each of 4 devices .* 24 in total"):
        jax.eval_shape(step, weights, other, batch)


def upkeep():
    """Each device fills and refreshes its own shard."""
    mesh = mesh_of(4)
    handler = handler_of({"scale": 1.0}, {}, SLOTS * 4)
    batches = batch_of(0, 4), batch_of(1, 4)
    corpus = {key: np.concatenate([b[key] for b in batches]) for key in FIELDS}

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P(), handler.specs(), P("data")),
        out_specs=handler.specs(),
    )
    def fill(weights, state, corpus):
        return handler.prefill(state, item_network(weights), corpus, batch_size=3)

    @jax.jit
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P(), handler.specs()), out_specs=handler.specs()
    )
    def refresh(weights, state):
        return handler.refresh(state, item_network(weights), SLOTS)

    state = fill(weights_of(0), handler.init(jax.random.key(0)), corpus)
    data, age = state.caches["cache"]
    assert [int((part == 0).sum()) for part in jnp.split(age, 4)] == [4] * 4
    data, age = refresh(weights_of(1), state).caches["cache"]
    close(data["embedding"], data["x"] @ weights_of(1)["item"])


def unique():
    """With unique_key an item has one slot in all shards, and its last row counts."""
    mesh, specs = mesh_of(4), {key: SPECS[key] for key in ("x", "id", "embedding")}
    handler = negcache.CacheLossHandler(
        negcache.CacheManager(specs, 48, unique_key="id"),
        negcache.DistributedCacheClassificationLoss("embedding", ("x",)),
        embedding_key="embedding",
        data_keys=("x",),
    )

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P(), handler.specs(), P("data")),
        out_specs=handler.specs(),
    )
    def step(weights, state, features):
        network = item_network(weights)
        query = features["x"] @ weights["query"]
        return handler.update_cache_and_compute_loss(
            state, network, query, network(features), features
        )[1]

    state, model = handler.init(jax.random.key(0)), {}
    state = jax.device_put(state, handler.shardings(mesh))
    for number in range(8):
        rng = np.random.default_rng(number)
        rows = {"x": rng.normal(size=(8, 2)), "id": rng.integers(0, 9, 8).astype(np.uint8)}
        state = step(weights_of(0), state, rows)
        model |= dict(zip(rows["id"].tolist(), rows["x"].tolist(), strict=True))
        data, age = state.caches["cache"]
        written = np.asarray(age) != negcache.EMPTY
        held = [np.asarray(data[key])[written].tolist() for key in ("id", "x")]
        assert sorted(held[0]) == sorted(model)
        assert dict(zip(*held, strict=True)) == model


def new_key(seed):
    typed = Version(metadata.version("orbax-checkpoint")) >= Version(
        "0.12"
    )  # before, it cannot save them
    return jax.random.key(seed) if typed else jax.random.PRNGKey(seed)


def save(path):
    handler, step = sharded_step(mesh_of(8), {"estimator": "shared"}, capacity=48)
    state = handler.init(new_key(7))
    state = jax.device_put(state, handler.shardings(mesh_of(8)))
    for number in range(3):
        _, state, _ = jax.jit(step)(weights_of(0), state, batch_of(number, 8))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(Path(path) / "checkpoint", state)
    np.savez(Path(path) / "whole.npz", **named(state))


def named(state):
    data, age = state.caches["cache"]
    return {**data, "age": age, "key": jax.random.key_data(state.key)}


def load(path):
    mesh = mesh_of(jax.device_count())
    handler, step = sharded_step(mesh, {"estimator": "shared"}, capacity=48)
    shapes = jax.eval_shape(handler.init, new_key(0))
    target = jax.tree.map(
        lambda each, sharding: jax.ShapeDtypeStruct(each.shape, each.dtype, sharding=sharding),
        shapes,
        handler.shardings(mesh),
    )
    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore(Path(path) / "checkpoint", target)
    whole = np.load(Path(path) / "whole.npz")
    assert {1, 2, 0} <= set(whole["age"].tolist())
    for key, value in named(state).items():
        np.testing.assert_array_equal(value, whole[key])
    assert len(state.caches["cache"].age.addressable_shards) == jax.device_count()
    loss, _, _ = jax.jit(step)(weights_of(0), state, batch_of(4, jax.device_count()))
    assert np.isfinite(loss)
    assert loss > 0


def run(devices, *cases, warnings="error"):
    """Run cases in turn in a process: a function of this file and its arguments, each."""
    flags = [
        f"--xla_force_host_platform_device_count={devices}",
        "--xla_backend_optimization_level=0",  # nearly all of the time goes into compiling
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_use_fusion_emitters=false",
        "--xla_cpu_parallel_codegen_split_count=1",
    ]
    done = programs.run(
        *("-W", warnings, __file__, *programs.words_of(cases)),
        timeout=550,
        tail=8000,
        XLA_FLAGS=" ".join(flags),
        JAX_PLATFORMS="cpu",
        JAX_ENABLE_X64="1",
        PYTHONPATH=os.pathsep.join(sys.path),  # this file imports what tests share
    )
    assert done.stdout.splitlines() == [f"{case[0]} on {devices} devices: done" for case in cases]


def test_shards_are_the_one_big_cache():
    run(4, ("paper",), ("shared",), ("exact_query",), ("unchecked",))


def test_on_four_devices():
    run(4, ("two_axes",), ("front_door",), ("verbs",), ("mistakes",), ("upkeep",), ("unique",))


def test_on_eight_devices_whose_checkpoint_loads_on_fewer(tmp_path):
    run(8, ("donated",), ("save", tmp_path), warnings="default")  # Orbax warns
    for devices in (1, 4):
        run(devices, ("load", tmp_path), warnings="default")


def test_a_mesh_that_does_not_fit_is_refused():
    handler = handler_of({"scale": 1.0}, {}, 10)
    with pytest.raises(
        negcache.CapacityError, match=r"10 slots cannot be split into 4 equal shards"
    ):
        handler.shardings(AbstractMesh((4,), ("data",)))
    with pytest.raises(negcache.OptionError, match=r"the mesh has axes \('batch',\)"):
        handler.shardings(AbstractMesh((5,), ("batch",)))
    assert handler.shardings(AbstractMesh((5,), ("data",))).key.spec == P()


def test_options_that_do_not_go_with_shards_are_refused():
    weights, batch = weights_of(0), batch_of(0, 1)
    handler = handler_of(weights, {}, 8)
    given, features, _ = arguments_of(weights, batch, {})
    with pytest.raises(negcache.OptionError, match=r"inside jax\.shard_map"):
        handler.update_cache_and_compute_loss(handler.init(jax.random.key(0)), *given, features)
    with pytest.raises(negcache.OptionError, match="different groups"):
        handler_of(weights, {"group": "data"}, 8, group="batch")
    plain = handler_of(weights, {}, 8, {"one": negcache.CacheManager(SPECS, 8)})
    with pytest.raises(negcache.OptionError, match="for a sharded cache"):
        plain.specs()


if __name__ == "__main__":
    programs.main(
        globals(),
        sys.argv[1:],
        lambda name: print(f"{name} on {jax.device_count()} devices: done"),  # noqa: T201
    )
