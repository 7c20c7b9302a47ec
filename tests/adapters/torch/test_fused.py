"""The fused kernels are the core's block weights and readout, in Triton's interpreter.

Triton reads TRITON_INTERPRET when it is imported, so the cases run this file as a program: all in
one process. Without that variable, the program tests the kernels on a device.
"""

import importlib.util
import os
import sys
import tempfile
from collections import defaultdict

import numpy as np
import programs
import pytest
import torch
import triton_apart
from negcache_torch import OptionError
from negcache_torch._fused import block_weights, fused_problem, plan_readout, plan_weights

from negcache_core import EMPTY
from negcache_core.arrays.backend import NUMPY
from negcache_core.arrays.exclusion import Exclusions, Labels
from negcache_core.retrieval.scorer import Scorer
from negcache_core.retrieval.tiled_scores import BLOCK, CacheScores, empty_readout

FLOAT, HALF, BRAIN, BYTE = torch.float32, torch.float16, torch.bfloat16, torch.int8
EXACT = 1e-5
# How far means may be off: probabilities are rounded to the rows' half type, for integers float16.
READOUT = {FLOAT: EXACT, HALF: 2e-3, BRAIN: 2e-2, BYTE: 2e-3}
SHAPES = [(1, 1, 1), (3, 97, 3), (7, 400, 80), (40, 200, 48)]
LABELS = [("uint8", 2), ("int64", 1), ("bool", 1), ("int32", 3), ("uint32", 1)]
FAR = {"int64": (2**40, 2**62), "uint32": (1, 2**32 - 40)}  # equal in their last digits, or high
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"


def case(
    rows, slots, width, dtype=FLOAT, stored=None, *, ids=(), empty=0.3, large=1.0, seed=0, **facts
):
    """Return arguments of `block_weights`; facts that are true are given."""
    rng = np.random.default_rng(seed)
    stored = dtype if stored is None else stored

    def normal(*shape):
        return torch.asarray(rng.standard_normal(shape), dtype=FLOAT)

    def array_of(dtype, *shape):
        if dtype == BYTE:
            return torch.asarray(rng.integers(-127, 128, shape), dtype=BYTE)
        return normal(*shape).to(dtype)

    def labels(dtype, high, *shape):
        step, start = FAR.get(dtype, (1, 0))
        numbers = step * rng.integers(0, high, shape) + start
        return torch.asarray(numbers).to(getattr(torch, dtype))

    scaled = large * (normal(rows).abs() + 0.5)
    queries, table = array_of(dtype, rows, width), array_of(stored, slots, width)
    if large > 1:
        queries = (queries * large).to(dtype)
    vacant = torch.asarray(rng.random(slots) < empty)
    row_scale = 0.001 + normal(slots).abs() / 127 if stored == BYTE else None
    bias = normal(slots) if facts.get("bias") else None
    for array in (table, row_scale, bias):
        if array is not None and array.dtype != BYTE:
            array[vacant] = torch.nan
    group = labels("int32", 3, slots) if facts.get("group") else None
    high = [2 if kind == "bool" else 40 for kind, _ in ids]
    marks = [labels(kind, most, rows, place) for (kind, place), most in zip(ids, high, strict=True)]
    own = Exclusions(
        tuple(marks),
        None if group is None else labels("int32", 4, rows),  # one of them is no slot's
        width**0.5 * normal(rows).abs() if facts.get("ceiling") else None,
    )
    found = {
        "queries": queries,
        "table": table,
        "age": torch.where(vacant, EMPTY, 5).to(torch.int32),
        "query_scale": scaled / 127 if dtype == BYTE else None,
        "row_scale": row_scale,
        "bias": bias,
        "labels": Labels(
            tuple([labels(kind, most, slots) for (kind, _), most in zip(ids, high, strict=True)]),
            group,
        ),
        "own": own,
    }

    def there(value):
        if isinstance(value, tuple):
            return (
                value._make(map(there, value)) if hasattr(value, "_make") else (*map(there, value),)
            )
        return None if value is None else value.to(DEVICE)

    found = {name: there(value) for name, value in found.items()}
    return {**found, "own": Exclusions.of(found["own"].arrays()), "block": BLOCK}


def reference(given):
    """Return weights, log-partition and mean of the core, in float64."""

    def plain(array):
        if array is None:
            return None
        if array.is_floating_point() or array.dtype == BYTE:
            array = array.double()
        return array.cpu().numpy()

    queries, table = plain(given["queries"]), plain(given["table"])
    if given["query_scale"] is not None:
        queries = queries * plain(given["query_scale"])[:, None]
    if given["row_scale"] is not None:
        table = table * plain(given["row_scale"])[:, None]
    own = given["own"]
    scores = CacheScores(
        queries,
        table,
        plain(given["age"]),
        0,
        2 * BLOCK,
        Scorer(None, None, np.float64, NUMPY.xp),
        NUMPY,
        None if own is None else Exclusions.of([plain(each) for each in own.arrays()]),
        given["labels"].each(plain) if own is not None else Labels(),
        plain(given["bias"]),
    )
    weights, readout = scores.block_weights(empty_readout(queries, xp=NUMPY.xp))
    return weights, *readout


def assert_near(found, expected, tolerance):
    assert found.dtype == FLOAT
    expected = torch.asarray(expected, dtype=torch.float64)
    torch.testing.assert_close(found.double().cpu(), expected, rtol=tolerance, atol=tolerance)


def agrees(given, readout=READOUT[FLOAT]):
    expected = reference(given)
    weights, nothing = block_weights(**given, readout=False)
    assert nothing is None
    assert_near(weights, expected[0], EXACT)
    weights, found = block_weights(**given, readout=True)
    for each, wanted, tolerance in zip(
        (weights, *found), expected, (EXACT, EXACT, readout), strict=True
    ):
        assert_near(each, wanted, tolerance)
    return expected


def every_dtype():
    for dtype, stored in [*((each, each) for each in (FLOAT, HALF, BRAIN, BYTE)), (BRAIN, HALF)]:
        for shape in SHAPES:
            agrees(case(*shape, dtype, stored), READOUT[dtype])
    for dtype, tolerance in ((FLOAT, EXACT), (HALF, 2e-3), (BRAIN, 2e-3)):  # and rows of integers
        for shape in SHAPES:
            agrees(case(*shape, dtype, BYTE), tolerance)


def each_fact():
    shape = (5, 300, 20)
    for number in range(len(LABELS)):
        agrees(case(*shape, ids=LABELS[number : number + 1], seed=number))
    for name in ("group", "ceiling", "bias"):
        agrees(case(*shape, **{name: True}))


def all_facts():
    every = {"ids": LABELS, "group": True, "ceiling": True, "bias": True}
    for dtype in (FLOAT, BRAIN, BYTE):
        weights, partition, _ = agrees(case(35, 700, 33, dtype, **every), READOUT[dtype])
        assert np.isfinite(weights).any()
        assert not np.isfinite(partition).all()  # of a group without slots


def nothing_counts():
    for given in (case(5, 200, 7, empty=1.0), case(5, 200, 7, BYTE, empty=1.0)):
        weights, partition, mean = agrees(given)
        assert np.isneginf(weights).all()
        assert np.isneginf(partition).all()
        assert not mean.any()
    none = {**case(5, 200, 7), "queries": torch.empty((0, 7), device=DEVICE)}
    weights, (partition, mean) = block_weights(**none, readout=True)
    assert (weights.shape, partition.shape, mean.shape) == ((0, 2), (0,), (0, 7))


def large_scores():
    given = case(4, 400, 8, large=1e4)
    assert (given["queries"] @ given["table"].nan_to_num().T).abs().max() > 2e4
    agrees(given)


def exact_integers():
    """Products of integers are summed as such: 1,024 of 127² are not a float16, nor a bfloat16."""
    given = case(2, 140, 1024, BYTE, empty=0)
    given["queries"].fill_(127)
    given["table"].fill_(127)
    given["table"][1::2] = -127
    agrees(given, READOUT[BYTE])


def scales_far_apart():
    """Rows of integers are lost neither beside one that does not count nor among larger ones."""
    given = case(3, 200, 5, BYTE, empty=0, group=True)
    given["own"] = given["own"]._replace(group=torch.tensor([0, 1, 2], device=DEVICE).int())
    given["row_scale"][given["labels"].group == 2] *= 1e20
    assert_near_rows(given)
    for first, second in ((1e4, 1e-34), (1e-34, 1e4), (1e-34, 1e-34), (1e20, 1e20)):
        given = case(3, 200, 5, BYTE)
        given["row_scale"][:BLOCK] *= first
        given["row_scale"][BLOCK:] *= second
        given["query_scale"] /= max(first, second)
        assert_near_rows(given)


def assert_near_rows(given):
    """Check the readout, of rows of any length."""
    expected = torch.asarray(reference(given)[2])
    found = block_weights(**given, readout=True)[1][1].double().cpu()
    assert ((found - expected).norm(dim=1) < READOUT[BYTE] * expected.norm(dim=1)).all()


def wide_rows():
    """Of more columns than a program has."""
    assert plan_readout(2, 1100, FLOAT, FLOAT, BLOCK).first < 1100
    agrees(case(2, 40, 1100))
    agrees(case(2, 40, 1040, HALF), READOUT[HALF])


def either_way_to_allow_tf32():
    """PyTorch raises where it is asked in one way and was told in the other."""
    ways = torch.backends.cuda.matmul
    before = ways.fp32_precision
    try:
        ways.fp32_precision = "tf32"
        block_weights(**case(2, 140, 8), readout=True)
    finally:
        ways.fp32_precision = before


def nan_shows():
    """A NaN that counts makes its query's numbers NaN, and no other's; a ceiling keeps it."""
    given = case(3, 200, 5, empty=0, ceiling=True)
    given["queries"][1] = torch.nan
    weights, (partition, mean) = block_weights(**given, readout=True)
    for found in (weights, partition[:, None], mean):
        assert found.isnan().all(1).tolist() == [False, True, False]
        assert not found[::2].isnan().any()


def views():
    """Arrays that are not contiguous."""
    given = case(4, 200, 6)
    expected = block_weights(**given, readout=True)
    given["queries"] = given["queries"].T.contiguous().T
    given["table"] = torch.cat([given["table"]] * 2, 1)[:, :6]
    found = block_weights(**given, readout=True)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1][1], expected[1][1])


def compiled():
    """It is one opaque call, also where the number of queries is symbolic."""

    def step(queries, given):
        weights, (partition, mean) = block_weights(**given, queries=2 * queries, readout=True)
        return weights.exp().sum(1), partition, mean @ mean.T

    fast = torch.compile(step, backend="eager", fullgraph=True, dynamic=True)
    for rows in (4, 9):
        given = case(rows, 200, 6, ids=LABELS, ceiling=True)
        queries = given.pop("queries")
        for found, expected in zip(fast(queries, given), step(queries, given), strict=True):
            assert torch.equal(found, expected)
    torch.library.opcheck(
        torch.ops.negcache.block_weights,
        (queries, given["table"], given["age"], *[None] * 3, [], [], *[None] * 3, BLOCK, True),
        test_utils=("test_schema", "test_faketensor"),
    )


CASES = [  # of the program
    every_dtype,
    each_fact,
    all_facts,
    nothing_counts,
    large_scores,
    exact_integers,
    scales_far_apart,
    wide_rows,
    either_way_to_allow_tf32,
    nan_shows,
    views,
    compiled,
]


def test_kernels_agree_with_the_core():
    done = programs.run(__file__, **triton_apart.interpreting())
    assert done.stdout.splitlines() == [each.__name__ for each in CASES]


class Elsewhere:
    """A driver of a device that is not here."""

    def __init__(self, target):
        self.get_current_target = lambda: target
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0


class Compiled:
    """A kernel that is compiled where it would be launched."""

    def __init__(self, kernel, found):
        self.kernel, self.found = kernel, found

    def __getitem__(self, grid):
        return lambda *given, **options: self.found.append(
            self.kernel.run(*given, grid=grid, warmup=True, **options)
        )


def for_a_device(capability, dtype, width):
    """The compiler refuses more than the interpreter. Products run on tensor cores."""
    with pytest.MonkeyPatch.context() as monkeypatch, tempfile.TemporaryDirectory() as folder:
        compiled_for(int(capability), getattr(torch, dtype), int(width), monkeypatch, folder)


def compiled_for(capability, dtype, width, monkeypatch, folder):
    _fused_kernels = importlib.import_module("negcache_torch._fused_kernels")
    target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", capability, 32)
    driver = importlib.import_module("triton.runtime.driver").driver

    found = []
    monkeypatch.setenv("TRITON_CACHE_DIR", folder)
    monkeypatch.setattr(driver, "_active", Elsewhere(target))
    monkeypatch.setattr("negcache_torch._fused.fused_problem", lambda array: None)
    for name in ("weigh", "read"):
        kernel = getattr(_fused_kernels, name)
        monkeypatch.setattr(kernel, "device_caches", defaultdict(kernel.create_binder))
        monkeypatch.setattr(_fused_kernels, name, Compiled(kernel, found))
    facts = dict.fromkeys(("group", "ceiling", "bias"), dtype != FLOAT)
    given = case(40, 300, width, dtype, ids=LABELS if dtype != FLOAT else (), **facts)
    block_weights(**given, readout=False)
    block_weights(**given, readout=True)
    assert len(found) == 2
    for kernel in found:
        assert ("mma" in kernel.asm["ptx"]) == (dtype != FLOAT)  # of float32, only where allowed
        assert kernel.metadata.shared <= 99 * 1024  # bytes, of every device since 8.0


def test_kernels_compile_for_a_device():
    devices = [(80, "bfloat16", 48), (90, "int8", 80), (90, "float32", 20)]
    cases = programs.words_of([("for_a_device", *each) for each in devices])
    given = {**triton_apart.interpreting(), "TRITON_INTERPRET": "0"}
    programs.run("-W", "ignore:TRITON_DEFAULT_FP_FUSION", __file__, *cases, **given)


def find_triton(monkeypatch, package):
    """Let Triton be found where another package is."""
    found = importlib.util.find_spec

    def find(name, *more):
        return found(package if name == "triton" else name, *more)

    monkeypatch.setattr("importlib.util.find_spec", find)


def test_arrays_on_no_device_are_refused_in_words(monkeypatch):
    find_triton(monkeypatch, "torch")
    monkeypatch.setitem(globals(), "DEVICE", "cpu")
    given = case(2, 5, 3)
    with pytest.raises(OptionError, match="got arrays on cpu, expected them on a CUDA") as one:
        block_weights(**given, readout=False)
    assert "TRITON_INTERPRET=1" in str(one.value)


def test_an_order_of_imports_that_ends_the_process_is_refused_in_words(monkeypatch):
    find_triton(monkeypatch, "torch")
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    monkeypatch.delitem(sys.modules, "tensorflow", raising=False)
    assert fused_problem() is None
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    assert "Add `import triton` above `import tensorflow`." in fused_problem()


def test_a_missing_triton_is_told_in_words(monkeypatch):
    find_triton(monkeypatch, "no_such_package")
    assert "Triton is not installed. Install it" in fused_problem(torch.zeros(1))
    with pytest.raises(OptionError, match="pip install triton"):
        block_weights(**case(2, 5, 3), readout=True)


@pytest.mark.parametrize("width", [1, 3, 16, 17, 48, 80, 384, 600, 768, 1024, 1040, 1536, 4096])
@pytest.mark.parametrize("scoring", [FLOAT, HALF, BYTE])
def test_plans_fit_the_kernels(width, scoring):
    """Sizes are powers of two, products have what they need, and columns are all there."""
    reading = HALF if scoring == BYTE else scoring
    for rows in (1, 16, 33, 5000):
        for plan in (
            plan_weights(rows, width, scoring, BLOCK),
            plan_readout(rows, width, scoring, reading, BLOCK),
        ):
            assert all(size & (size - 1) == 0 for size in plan[:3] + plan[5:])
            assert plan.rows >= 16
            assert plan.slots >= 16
            assert BLOCK % plan.slots == 0
            assert plan.columns >= (32 if scoring == BYTE else 16)
        columns = plan.first + plan.second
        parts = -(-width // columns)
        assert parts == -(-width // 1024)
        assert plan.rows * columns <= 64 * 32 * plan.warps  # accumulators in registers


if __name__ == "__main__":
    programs.main(globals(), sys.argv[1:] or [each.__name__ for each in CASES], print)
