"""What `make gpu` runs, at small size on the CPU; and that a step asks a device for no value."""

import sys
import warnings
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

ROOT = Path(__file__).parents[2]


MODULES = {
    "reads": "_host_reads",
    "kinds": "_kinds_of_steps",
    "asking": "a_step_asks_the_device_for_nothing",
    "jobs": "_device_jobs",
    "in_torch": "_device_torch",
    "in_jax": "_device_jax",
    "timing": "a_step_on_a_device",
    "pictures": "_pictures_of_devices",
    "summary": "gpu_summary",
}


@pytest.fixture(scope="module")
def programs():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield SimpleNamespace(**{key: import_module(name) for key, name in MODULES.items()})


def test_a_step_asks_the_device_for_no_value(programs):
    with programs.reads.as_on_a_device():
        found = dict(programs.asking.of_steps(torch.device("cpu")))
    missing = [name for name, reads in found.items() if isinstance(reads, str)]
    assert set(missing) <= set(programs.asking.MAY_BE_MISSING)
    assert {name: reads for name, reads in found.items() if reads and name not in missing} == {}


def test_a_step_copies_nothing_to_or_from_the_device(programs, monkeypatch):
    """On the meta device, which has no values: a copy from the host would be seen."""
    monkeypatch.delitem(programs.kinds.STEPS, "autocast")  # which does not know that device
    with programs.reads.as_on_a_device():
        found = dict(programs.asking.of_steps(torch.device("meta"), 1))
    assert {name: reads for name, reads in found.items() if reads and type(reads) is list} == {}


def test_what_asks_between_steps_is_documented(programs, tmp_path):
    with programs.reads.as_on_a_device():
        found = dict(programs.asking.between_steps(torch.device("cpu"), tmp_path))
    assert {name for name, reads in found.items() if reads} == set(programs.asking.DOCUMENTED)
    page = (ROOT / "docs" / "gpu.md").read_text()
    assert [name for name in programs.asking.DOCUMENTED if name not in page] == []


def test_a_step_that_asks_is_noticed(programs):
    """The CPU's own ways, which look at values, are found where they stand."""
    device = torch.device("cpu")
    step = programs.kinds.STEPS["id_keys"](device)
    with programs.reads.watched() as found:
        step(programs.kinds.batches(1, device)[0])
    assert {"TorchBackend.read_blocks", "TorchBackend.exclude"} & {read.function for read in found}
    assert all(read.file.startswith("negcache_") and read.code for read in found)


@pytest.mark.parametrize(
    ("function", "operation"),
    [
        (lambda x: float(x[0]), "aten._local_scalar_dense.default"),
        (lambda x: x[x > 0], "aten.index.Tensor"),
        (lambda x: x.tolist(), "Tensor.tolist"),
        (lambda x: x.index_put((x > 0,), torch.zeros(())), "aten.index_put.default"),
        (lambda x: torch.tensor([1.0]) + x, "aten.lift_fresh.default"),
        (lambda x: torch.repeat_interleave(x, x.long()), "aten.repeat_interleave.Tensor"),
        (lambda x: x.to("meta"), "aten._to_copy.default"),
        (lambda x: functional.relu(x)[[0, 1]].sum().item(), "aten._local_scalar_dense.default"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_way_to_wait_is_noticed(programs, function, operation):
    x = torch.arange(3.0)
    with programs.reads.watched() as found:
        function(x)
    assert operation in {read.operation for read in found}
    assert {read.file for read in found} == {Path(__file__).name}


def test_a_read_in_the_backward_pass_is_noticed(programs):
    class Curious(torch.autograd.Function):
        @staticmethod
        def forward(context, x):
            return x.clone()

        @staticmethod
        def backward(context, gradient):
            return gradient * float(gradient.sum())

    x = torch.ones(3, requires_grad=True)
    with programs.reads.watched() as found:
        Curious.apply(x).sum().backward()
    assert [read.function.rpartition(".")[2] for read in found] == ["backward"]


def test_what_cuda_says_is_noted_where_it_is_said(programs, monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with programs.reads.watched() as found:
        for _ in range(2):
            warnings.warn(f"{programs.reads.CUDA_SAYS} (Triggered internally)", stacklevel=1)
    assert modes == ["warn", "default"]
    (read,) = found
    assert (read.operation, read.file) == ("CUDA", Path(__file__).name)
    assert "warnings.warn" in read.code


def run(programs, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["a_step_on_a_device.py", *map(str, words)])
    programs.timing.main()


def of(records, **facts):
    return [each for each in records if all(each[key] == facts[key] for key in facts)]


SIZE = ("--slots", 256, "--width", 8, "--rows", 4, "--seconds", 0)


def test_steps_are_timed_beside_products(programs, monkeypatch, tmp_path, capsys):
    out = tmp_path / "kept" / "results.jsonl"
    modes = ("--modes", "eager", "graph")
    run(programs, monkeypatch, "torch", "--device", "cpu", *SIZE, *modes, "--out", out)
    records = programs.jobs.read(out)
    assert len(records) == 24
    assert len(of(records, what="product")) == len(of(records, what="read")) == 3
    for loss in ("exact_query", "paper"):
        facts = {"what": "step", "mode": "eager", "loss": loss, "fused": False}
        for storage in ("float32", "bfloat16"):
            (step,) = of(records, **facts, storage=storage)
            assert step["ms"] > 0
            assert step["MB"] > 0
    graphs = of(records, mode="graph", fused=False, storage="float32")
    assert {each["error"].partition(":")[0] for each in graphs} == {"not there"}
    assert not [each for each in records if "failed" in each.get("error", "")]
    # A second run adds lines, of which the later ones count; no time is left for more.
    count = len(out.read_text().splitlines())
    run(programs, monkeypatch, "torch", "--device", "cpu", *SIZE, "--minutes", 0, "--out", out)
    assert len(out.read_text().splitlines()) == count
    assert "measurements are left out" in capsys.readouterr().out
    (said,) = programs.summary.of_steps(out)
    assert said.startswith(f"cpu, PyTorch {torch.__version__}: milliseconds\n")
    assert "there are no CUDA graphs on cpu" in said


def test_jax_is_timed(programs):
    meter = programs.in_jax.Meter("cpu", seconds=0)
    size = programs.jobs.Size(64, 4, 2)
    for job in (
        programs.jobs.Job("product", size, "bfloat16"),
        programs.jobs.Job("step", size, "float32", "paper", "jit"),
    ):
        found = programs.timing.attempt(meter, programs.in_jax, job)
        assert found["ms"] > 0, found


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried\nto"),
            "does not fit: CUDA out of memory",
        ),
        (ValueError("no\nluck"), "failed: ValueError: no"),
        (TypeError("an unexpected keyword"), "not there: TypeError: an unexpected keyword"),
    ],
)
def test_what_cannot_be_measured_is_said(programs, raised, said):
    class Broken:
        def measure(self, job):
            raise raised

    found = programs.timing.attempt(Broken(), programs.in_torch, None)
    assert found["error"].startswith(said)
    assert "\n" not in found["error"]


def test_the_most_telling_sizes_come_first(programs):
    jobs = programs.jobs
    every = jobs.sizes(jobs.SLOTS, jobs.WIDTHS, jobs.ROWS)
    assert len(every) == 24
    assert every[:5] == [
        (1_048_576, 128, 64),
        (1_048_576, 768, 64),
        (131_072, 128, 64),
        (131_072, 768, 64),
        (1_048_576, 128, 512),
    ]
    assert {size.slots for size in every[16:]} == {8_388_608}
    todo = jobs.jobs(every, jobs.MODES)
    assert len(set(todo)) == len(todo)
    compiled = [job.mode == "compiled" for job in todo]
    assert compiled == sorted(compiled)  # they take longest


def test_pictures_are_drawn_from_results(programs, monkeypatch, tmp_path):
    """Of one device: the one with most figures; a size without its product has no ratio."""
    jobs, path = programs.jobs, tmp_path / "results.jsonl"
    monkeypatch.setattr(programs.pictures, "KEPT", path)
    pictures = (
        programs.pictures.step_time("torch"),
        programs.pictures.step_time("jax"),
        programs.pictures.step_memory,
    )
    assert [draw() for draw in pictures] == [None, None, None]
    sizes = jobs.sizes([1_024, 4_096], [8], [4, 16])
    for device, some in (("A", sizes), ("B", sizes[:1])):
        for job in jobs.jobs(some, ("graph", "eager")):
            figures = {"ms": 3.0, "MB": 7.0} if job.what == "step" else {"ms": 2.0}
            if job.what == "product" and job.size == sizes[-1]:
                figures = {"error": "does not fit"}
            about = {"device": device, "framework": "torch", "version": "PyTorch 0"}
            jobs.keep(path, {**about, **job.record(), **figures})
    time, nothing, memory = (draw() for draw in pictures)
    assert nothing is None
    assert time.get_suptitle().endswith("\nA, PyTorch 0")
    assert [len(figure.axes) for figure in (time, memory)] == [2, 2]
    drawn = [line.get_ydata() for line in time.axes[0].lines]  # the smaller cache
    assert [list(values) for values in drawn].count([1.5]) == 7  # six series, and eager code
