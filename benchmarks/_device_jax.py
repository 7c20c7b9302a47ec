"""Measures jobs in JAX: a step is one jitted function whose state is donated."""

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import negcache_jax as negcache
from _device_jobs import Job, Size

VOCABULARY, FILLED_BY = 50_000, 1_048_576
SECONDS, MOST, TOGETHER = 0.4, 40, 5
LOSSES: dict[str, dict[str, Any]] = {
    "exact_query": {},
    "paper": {"estimator": "paper", "in_batch_negatives": False, "max_staleness": None},
}
NOT_HERE = (negcache.OptionError, negcache.DTypeError, negcache.KindError, TypeError)
NO_MEMORY = MemoryError  # JAX has no class for it; see `Meter.measure`


class Meter:
    """Measures on JAX's first device, for at most `seconds` for each job after its warm-up."""

    version = f"JAX {jax.__version__}"

    def __init__(self, device: str, seconds: float = SECONDS) -> None:
        del device  # JAX_PLATFORMS chooses it
        self.seconds = seconds
        self.name = jax.devices()[0].device_kind

    def measure(self, job: Job) -> dict[str, Any]:
        """Return "ms", by the host's clock over several calls, and "MB" as the compiler plans."""
        try:
            return self._product(job) if job.what == "product" else self._step(job)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" in str(error):
                raise NO_MEMORY(str(error)) from error
            raise

    def clean(self) -> None:
        """Free what the last job held."""
        gc.collect()

    def timed(self, run: Callable[[], Any]) -> float:
        """Return the median milliseconds of a call, of several that are queued together."""
        jax.block_until_ready(run())
        times: list[float] = []
        while len(times) < 3 or (sum(times) < 1e3 * self.seconds and len(times) < MOST):
            start = time.perf_counter()
            for _ in range(TOGETHER):
                last = run()
            jax.block_until_ready(last)
            times.append(1e3 * (time.perf_counter() - start) / TOGETHER)
        return statistics.median(times)

    def _product(self, job: Job) -> dict[str, Any]:
        kind = jnp.bfloat16 if job.storage == "bfloat16" else jnp.float32
        precision = "tensorfloat32" if job.storage == "tf32" else "highest"
        keys = jax.random.split(jax.random.key(0))
        query = jax.random.normal(keys[0], (job.size.rows, job.size.width), kind)
        table = jax.random.normal(keys[1], (job.size.slots, job.size.width), kind)
        product = jax.jit(lambda query, table: jnp.matmul(query, table.T, precision=precision))
        return {"ms": self.timed(lambda: product(query, table))}

    def _step(self, job: Job) -> dict[str, Any]:
        case = Case(job.size, job.storage, fused=job.fused, **LOSSES[job.loss])
        step = jax.jit(case.step, donate_argnums=1)
        compiled = step.lower(case.given, case.state).compile()
        planned = compiled.memory_analysis()
        beyond = planned.output_size_in_bytes - planned.alias_size_in_bytes
        held = [case.state]
        case.state = None

        def run() -> Any:
            result, held[0] = compiled(case.given, held[0])
            return result

        return {"ms": self.timed(run), "MB": (planned.temp_size_in_bytes + beyond) / 1e6}


class Case:
    """A full cache, and a step with it; the tower is that of PyTorch's case."""

    def __init__(self, size: Size, storage: str, *, fused: bool, **options: Any) -> None:
        keys = jax.random.split(jax.random.key(0), 4)
        self.words = (
            jax.random.normal(keys[0], (VOCABULARY, size.width), jnp.float32) / size.width**0.5
        )
        query = jax.random.normal(keys[1], (size.rows, size.width), jnp.float32)
        self.given = query, jnp.ones(size.width, jnp.float32)
        self.features = {"id": jax.random.randint(keys[2], (size.rows,), 0, VOCABULARY, jnp.int32)}
        self.loss_fn = negcache.NegativeCacheLoss(
            size.slots,
            {"id": negcache.FieldSpec((), "int32")},
            negcache.FieldSpec((size.width,), storage),
            1.0,
            **({"fused": True} if fused else {}),
            **options,
        )
        ids = jnp.arange(size.slots, dtype=jnp.int32) % VOCABULARY
        state = self.loss_fn.init(keys[3])
        self.state: Any = self.loss_fn.prefill(
            state, self.network(self.given[1]), {"id": ids}, FILLED_BY
        )

    def network(self, gain: jax.Array) -> Callable[[dict[str, jax.Array]], jax.Array]:
        """Return the item network."""
        return lambda features: self.words[features["id"]] * gain

    def step(self, given: Any, state: Any) -> Any:
        """Return the loss and its gradients, and the state after the step."""

        def loss(given: Any) -> Any:
            query, gain = given
            network = self.network(gain)
            return self.loss_fn(state, network, query, network(self.features), self.features)

        (value, after), gradients = jax.value_and_grad(loss, has_aux=True)(given)
        return (value, gradients), after
