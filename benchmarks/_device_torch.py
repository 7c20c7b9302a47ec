"""Measures jobs in PyTorch, on CUDA or, to try the program, on a CPU."""

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import negcache_torch as negcache
import torch
from _device_jobs import BYTES, Job, Size
from _steps_torch import bytes_of_a_step

VOCABULARY, FILLED_BY = 50_000, 65_536
SECONDS, MOST, WARM_UP = 0.4, 200, 3
COPIED = 2**28  # numbers, to measure how fast memory is
LOSSES: dict[str, dict[str, Any]] = {
    "exact_query": {},
    "paper": {"estimator": "paper", "in_batch_negatives": False, "max_staleness": None},
}
NOT_HERE = (negcache.OptionError, negcache.DTypeError, negcache.KindError, TypeError)
NO_MEMORY = torch.OutOfMemoryError


class Meter:
    """Measures on one device, for at most `seconds` for each job after its warm-up."""

    version = f"PyTorch {torch.__version__}"

    def __init__(self, device: str, seconds: float = SECONDS) -> None:
        self.device, self.seconds = torch.device(device), seconds
        self.on_cuda = self.device.type == "cuda"
        self.name = torch.cuda.get_device_name() if self.on_cuda else device
        self._speed: float | None = None

    def measure(self, job: Job) -> dict[str, Any]:
        """Return "ms", and of a step in eager code "MB" beyond the tables."""
        if job.what == "read":
            size = job.size.slots * job.size.width * BYTES[job.storage]
            return {"ms": 1e3 * size / self.speed, "GB/s": self.speed / 1e9}
        return self._product(job) if job.what == "product" else self._step(job)

    def clean(self) -> None:
        """Free what the last job held; raise if the device is beyond use."""
        if self.on_cuda:
            gc.collect()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    @property
    def speed(self) -> float:
        """Bytes per second that a copy moves: it reads half of them, and writes half."""
        if self._speed is None:
            source = torch.ones(COPIED if self.on_cuda else 2**20, device=self.device)
            target = torch.empty_like(source)
            self._speed = 2e3 * source.nbytes / self.timed(lambda: target.copy_(source))
        return self._speed

    def timed(self, run: Callable[[], Any]) -> float:
        """Return the median milliseconds of a candidate, by the device's own clock."""
        for _ in range(WARM_UP):
            run()
        clock = self._by_events if self.on_cuda else _by_host
        times: list[float] = []
        while len(times) < 5 or (sum(times) < 1e3 * self.seconds and len(times) < MOST):
            times.append(clock(run))
        return statistics.median(times)

    def _by_events(self, run: Callable[[], Any]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def _product(self, job: Job) -> dict[str, Any]:
        kind = torch.bfloat16 if job.storage == "bfloat16" else torch.float32
        with self.device:
            query = torch.randn(job.size.rows, job.size.width).to(kind)
            table = torch.empty(job.size.slots, job.size.width, dtype=kind).normal_()
        torch.set_float32_matmul_precision("high" if job.storage == "tf32" else "highest")
        try:
            return {"ms": self.timed(lambda: query @ table.T)}
        finally:
            torch.set_float32_matmul_precision("highest")

    def _step(self, job: Job) -> dict[str, Any]:
        with self.device:  # and not around what is timed, which it would slow down
            case = Case(job.size, job.storage, fused=job.fused, **LOSSES[job.loss])
        if job.mode == "compiled":
            torch.compiler.reset()
            forward = torch.compile(case.forward, fullgraph=True)
            return {"ms": self.timed(lambda: forward().backward())}
        if job.mode == "eager":
            return {"ms": self.timed(case.step), "MB": self._memory(case.step) / 1e6}
        if not self.on_cuda:
            raise negcache.OptionError(f"there are no CUDA graphs on {self.name}.")
        return {"ms": self.timed(captured(case.step).replay)}

    def _memory(self, step: Callable[[], Any]) -> int:
        if not self.on_cuda:
            return bytes_of_a_step(step)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - held


class Case:
    """A full cache, and a step with it.

    The item tower looks rows up and multiplies them by a trained vector: it costs next to nothing,
    and has no gradient of a table's size.
    """

    def __init__(self, size: Size, storage: str, *, fused: bool, **options: Any) -> None:
        torch.manual_seed(0)
        self.words = torch.randn(VOCABULARY, size.width) / size.width**0.5
        self.gain = torch.ones(size.width, requires_grad=True)
        self.query = torch.randn(size.rows, size.width, requires_grad=True)
        self.features = {"id": torch.randint(0, VOCABULARY, (size.rows,))}
        self.loss_fn = negcache.NegativeCacheLoss(
            size.slots,
            {"id": negcache.FieldSpec((), torch.int64)},
            negcache.FieldSpec((size.width,), storage),
            1.0,
            generator=0,
            **({"fused": True} if fused else {}),
            **options,
        )
        ids = torch.arange(size.slots) % VOCABULARY
        self.loss_fn.prefill(self.network, {"id": ids}, FILLED_BY)

    def network(self, features: dict[str, torch.Tensor]) -> torch.Tensor:
        """Embed items."""
        return self.words[features["id"]] * self.gain

    def forward(self) -> torch.Tensor:
        """Return the loss of a step."""
        positive = self.network(self.features)
        return self.loss_fn(self.network, self.query, positive, self.features)

    def step(self) -> None:
        """Take a step, backward pass included."""
        self.forward().backward()


def captured(step: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """Return a step as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def _by_host(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)
