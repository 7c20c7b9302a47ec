"""The fused kernel is the core's block_weights: interpreted, or compiled where JAX has a GPU.

Without one it is lowered for one all the same, which shows what Pallas cannot lower.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from negcache_jax import _fused, _fused_kernel

from negcache_core import EMPTY, OptionError
from negcache_core.arrays.backend import NUMPY
from negcache_core.arrays.exclusion import Exclusions, Labels
from negcache_core.retrieval.scorer import Scorer
from negcache_core.retrieval.tiled_scores import BLOCK, CacheScores, empty_readout

pytestmark = pytest.mark.skipif(
    not hasattr(_fused.triton, "load"), reason="the kernel needs JAX 0.8 or newer"
)
GPU = jax.default_backend() == "gpu"
# The mean's tolerance: its weights are rounded to half dtypes, and for int8 to TF32 on a GPU.
TOLERANCE = {"float16": 2e-3, "bfloat16": 2e-2, "int8": 2e-3 if GPU else 1e-5}


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    if not GPU:
        monkeypatch.setenv(_fused.INTERPRET, "1")


def make(rows, slots, width, queries="float32", table="float32", seed=0, **more):
    """Return the arguments of block_weights, without any mask; `more` replaces some."""
    draw = np.random.default_rng(seed)

    def vectors(count, dtype):
        if dtype == "int8":
            return jnp.asarray(draw.integers(-127, 128, (count, width)), jnp.int8)
        return jnp.asarray(draw.normal(size=(count, width)), dtype)

    def scale(count, dtype, size):
        if dtype != "int8":
            return None
        return jnp.asarray(draw.uniform(0.5, 1, count) * size, jnp.float32)

    return {
        "queries": vectors(rows, queries),
        "table": vectors(slots, table),
        "age": jnp.zeros(slots, jnp.int32),
        "query_scale": scale(rows, queries, 0.01),
        "row_scale": scale(slots, table, 0.01),
        "bias": None,
        "labels": Labels(),
        "own": None,
        "block": BLOCK,
        "readout": True,
        **more,
    }


def with_masks(rows, slots, width, seed=0, **more):
    """Return arguments with every mask: ids of three keys and dtypes, a group, a ceiling, a bias.

    Some slots are empty, and their rows, scales and biases are NaN.
    """
    draw = np.random.default_rng(seed)
    call = make(rows, slots, width, seed=seed, **more)

    def of(values, dtype):
        return jnp.asarray(values, dtype)

    empty = draw.random(slots) < 0.2
    for key in ("table", "row_scale"):
        if call[key] is not None and call[key].dtype != jnp.int8:
            call[key] = call[key].at[empty].set(jnp.nan)
    bias = jnp.asarray(draw.normal(size=slots), jnp.float32).at[empty].set(jnp.nan)
    high = 2**32 - 1
    ids = (draw.integers(0, 9, slots), draw.integers(0, 99, slots), draw.random(slots) < 0.1)
    mine = (draw.integers(0, 9, (rows, 2)), draw.integers(0, 99, (rows, 5)), np.ones((rows, 1)))
    return {
        **call,
        "age": jnp.where(empty, EMPTY, of(draw.integers(0, 50, slots), jnp.int32)),
        "bias": bias,
        "labels": Labels(
            (of(ids[0], jnp.uint8), of(high - ids[1], jnp.uint32), of(ids[2], bool)),
            of(draw.integers(0, 3, slots), jnp.int32),
        ),
        "own": Exclusions(
            (of(mine[0], jnp.uint8), of(high - mine[1], jnp.uint32), of(mine[2], bool)),
            of(draw.integers(0, 3, rows), jnp.int32),
            of(draw.normal(size=rows) * 2, jnp.float32),
        ),
    }


def expected(call):
    """Return what the core makes of it in float64."""

    def wide(array, scale=None):
        array = np.asarray(array, np.float64)
        return array if scale is None else array * np.asarray(scale, np.float64)[:, None]

    own, labels = call["own"], call["labels"].each(np.asarray)
    if own is not None:
        own = Exclusions.of(
            [None if each is None else np.asarray(each) for each in own.arrays()],
        )
    scores = CacheScores(
        wide(call["queries"], call["query_scale"]),
        np.where(
            np.asarray(call["age"])[:, None] == EMPTY,
            7.0,  # of no matter
            wide(call["table"], call["row_scale"]),
        ),
        np.asarray(call["age"]),
        first=0,
        tile=BLOCK,
        scorer=Scorer(None, None, np.float64, NUMPY.xp),
        backend=NUMPY,
        own=own,
        labels=labels,
        bias=None if call["bias"] is None else np.nan_to_num(wide(call["bias"])),
    )
    return scores.block_weights(empty_readout(scores.queries, xp=NUMPY.xp))


def check(call, found=None, tolerance=1e-5):
    weights, readout = found or _fused.block_weights(**call)
    wanted, (log_partition, mean) = expected(call)
    assert weights.dtype == jnp.float32
    np.testing.assert_allclose(weights, wanted, rtol=1e-5, atol=1e-5)
    if call["readout"]:
        np.testing.assert_allclose(readout[0], log_partition, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(readout[1], mean, atol=tolerance)
        assert readout[1].dtype == jnp.float32
    else:
        assert readout is None
    return weights, readout


@pytest.mark.parametrize(
    ("queries", "table"),
    [
        ("float32", "float32"),
        ("float16", "float16"),
        ("bfloat16", "bfloat16"),
        ("float32", "int8"),
        ("bfloat16", "int8"),
        ("int8", "int8"),
    ],
)
def test_every_dtype_with_all_masks(queries, table, monkeypatch):
    monkeypatch.setattr(
        _fused_kernel, "PROGRAMS", 2
    )  # two splits of several blocks, the last one short
    call = with_masks(5, 600, 70, queries=queries, table=table)
    check(call, tolerance=TOLERANCE.get(table, 1e-5))


def test_masks_alone():
    call = with_masks(3, 150, 2)
    labels, own = call["labels"], call["own"]
    free = {**call, "own": None, "bias": None, "readout": False}
    check(free)  # labels are there, but no query asks for them
    check({**free, "bias": call["bias"]})
    check({**free, "labels": Labels(labels.ids[:1]), "own": Exclusions(own.ids[:1])})
    check({**free, "labels": Labels(group=labels.group), "own": Exclusions(group=own.group)})
    check({**free, "labels": Labels(), "own": Exclusions(ceiling=own.ceiling)})


def test_data_that_one_program_has_to_bear():
    """Many tiles of queries, and chunks of rows in a loop; nothing counts here and there."""
    call = with_masks(40, 260, 80)
    run = jax.jit(
        lambda arrays: _fused.block_weights(**arrays, block=BLOCK, readout=True),
    )

    def run_and_check(**changes):
        changed = {**call, **changes}
        arrays = {key: changed[key] for key in changed if key not in {"block", "readout"}}
        return check(changed, run(arrays))

    run_and_check()
    none = jnp.full(260, EMPTY, jnp.int32)
    weights, (log_partition, mean) = run_and_check(age=none)
    assert (weights == -jnp.inf).all()
    assert (log_partition == -jnp.inf).all()
    assert (mean == 0).all()
    group = call["own"].group.at[7].set(99)
    weights, (log_partition, mean) = run_and_check(own=call["own"]._replace(group=group))
    assert (weights[7] == -jnp.inf).all()
    assert log_partition[7] == -jnp.inf
    assert (mean[7] == 0).all()
    # Exact products of up to about 1e4, so float32 scores are those of float64.
    queries = jnp.round(call["queries"] * 30) * 16
    table = jnp.round(call["table"] * 2)
    ceiling = call["own"].ceiling * 1e4 + 0.25
    weights, _ = run_and_check(
        queries=queries, table=table, own=call["own"]._replace(ceiling=ceiling)
    )
    assert weights.max() > 1e4


def test_a_nan_is_not_above_a_ceiling_and_stays_in_its_block():
    call = make(1, 300, 3, readout=False, own=Exclusions(ceiling=jnp.zeros(1, jnp.float32)))
    call["table"] = call["table"].at[200, 1].set(jnp.nan)
    weights, _ = _fused.block_weights(**call)
    np.testing.assert_array_equal(jnp.isnan(weights), [[False, True, False]])


def test_fewer_slots_than_a_block_in_32_bits():
    with jax.enable_x64(False):  # noqa: FBT003
        check(make(1, 5, 1))
        call = with_masks(2, 130, 33)
        check(call)


@pytest.mark.parametrize("readout", [True, False])
def test_an_empty_batch(readout):
    """A device's part of the batch may be empty, but Pallas has no grid of no programs."""
    check(make(0, 300, 3, queries="int8", table="int8", readout=readout))


def test_no_gradient_flows_and_none_is_asked_of_the_kernel():
    call = make(2, 9, 3, readout=True)

    def total(queries, table):
        weights, (log_partition, mean) = _fused.block_weights(
            **{**call, "queries": queries, "table": table}
        )
        return weights.sum() + log_partition.sum() + mean.sum() + (queries**2).sum()

    by_queries, by_table = jax.jit(jax.grad(total, (0, 1)))(call["queries"], call["table"])
    np.testing.assert_allclose(by_queries, 2 * call["queries"])
    assert (by_table == 0).all()


def test_inside_shard_map_results_vary_as_the_inputs_do():
    call = make(2, 9, 3)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))

    def on_shard(queries, table, age):
        return _fused.block_weights(**{**call, "queries": queries, "table": table, "age": age})

    mapped = jax.shard_map(
        on_shard,
        mesh=mesh,
        in_specs=(P(), P("data"), P("data")),
        out_specs=(P(None, "data"), (P("data"), P("data"))),
    )
    check(call, jax.jit(mapped)(call["queries"], call["table"], call["age"]))


@pytest.mark.parametrize("x64", [True, False])
@pytest.mark.parametrize("readout", [True, False])
def test_it_lowers_for_a_gpu_that_is_not_here(monkeypatch, x64, readout):
    monkeypatch.setenv(_fused.INTERPRET, "0")
    with jax.enable_x64(x64):
        for queries, table, width in [
            ("float32", "float32", 80),
            ("float16", "float16", 3),
            ("bfloat16", "bfloat16", 300),
            ("float32", "int8", 16),
            ("bfloat16", "int8", 129),
            ("int8", "int8", 64),
        ]:
            call = with_masks(33, 300, width, queries=queries, table=table)
            options = {"block": call.pop("block"), "readout": readout}
            del call["readout"]
            run = jax.jit(lambda arrays, options=options: _fused.block_weights(**arrays, **options))
            program = run.trace(call).lower(lowering_platforms=("cuda",)).as_text()
            assert "xla.gpu.triton" in program
            assert "negcache_block_weights" in program


@pytest.mark.skipif(GPU, reason="a GPU is what the kernel compiles for")
def test_what_cannot_be_compiled_is_refused_in_words(monkeypatch):
    call = make(2, 9, 3)
    monkeypatch.setenv(_fused.INTERPRET, "yes")
    with pytest.raises(OptionError, match="NEGCACHE_PALLAS_INTERPRET=yes: expected 0 or 1"):
        _fused.block_weights(**call)
    monkeypatch.delenv(_fused.INTERPRET)
    refused = "fused=True on platform 'cpu': the kernel compiles for GPUs only"
    with pytest.raises(OptionError, match=refused):
        _fused.block_weights(**call)
    with pytest.raises(OptionError, match=refused):
        jax.jit(lambda queries: _fused.block_weights(**{**call, "queries": queries}))(
            call["queries"]
        )
    monkeypatch.delattr(_fused.triton, "load")
    with pytest.raises(OptionError, match=r"the kernel needs JAX 0\.8 or newer"):
        _fused.block_weights(**call)


def test_offsets_that_would_wrap_are_refused():
    shape = (2**23 + 1, 256)
    _fused._check_offsets(jax.ShapeDtypeStruct(shape, jnp.float32))  # more than 2**32 bytes
    _fused._check_offsets(jax.ShapeDtypeStruct((2**25, 256), jnp.int8))
    _fused._check_offsets(jax.ShapeDtypeStruct((2**23, 256), jnp.int8))  # the last offset fits
    with pytest.raises(OptionError, match=r"8388609 x 256 numbers of int8: .* fewer slots"):
        _fused._check_offsets(jax.ShapeDtypeStruct(shape, jnp.int8))
