"""JAX with everything on its first device, and shards on its first two.

`make gpu` runs these. With NEGCACHE_DEVICE=cpu they are tried on the CPU, which then has two.
"""

import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import negcache_jax as negcache
import numpy as np
import programs
import pytest

from negcache_core.testing import CHECKS, Adapter

PLATFORM = os.environ.get("NEGCACHE_DEVICE", "gpu").replace("cuda", "gpu")
SHARDS = Path(__file__).parents[1] / "adapters" / "jax" / "test_jax_shards.py"
WITH_REPLICAS = ("replicas", "shards")  # one program serves all devices
SLOTS, WIDTH, BATCH = 512, 8, 16


def gradients(function, arrays, *constants, wrap=lambda function: function):
    return [
        np.asarray(each)
        for each in wrap(jax.grad(function, argnums=tuple(range(len(arrays)))))(*arrays, *constants)
    ]


EAGER = Adapter(
    "jax",
    negcache,
    jnp.asarray,
    np.asarray,
    bind=lambda handler, cache: handler.bind(
        handler.init(jax.random.key(0))._replace(caches={"cache": cache})
    ),
    hold=lambda handler, seed: handler.bind(handler.init(jax.random.key(seed))),
    gradients=gradients,
)
JITTED = EAGER._replace(
    name="jax.jit",
    run=lambda function, state, batch: jax.jit(function)(state, batch),
    gradients=lambda *arguments: gradients(*arguments, wrap=jax.jit),
)


def test_it_is_a_gpu():
    assert jax.default_backend() == PLATFORM


@pytest.mark.parametrize("check", [name for name in CHECKS if name not in WITH_REPLICAS])
def test_the_device_passes_the_conformance_kit(check):
    """The gradients of every estimator, by enumeration of all draws, are among its checks."""
    CHECKS[check](JITTED)


@pytest.mark.parametrize("check", ["steps", "front_door", "prefill"])
def test_code_that_is_not_compiled_passes_too(check):
    CHECKS[check](EAGER)


class Training:
    """Linear towers and a cache; products in float64, so that devices agree."""

    def __init__(self, **options):
        self.loss_fn = negcache.NegativeCacheLoss(
            SLOTS,
            {"x": negcache.FieldSpec((WIDTH,), "float64")},
            negcache.FieldSpec((WIDTH,), "float64"),
            5.0,
            labels={"id": negcache.FieldSpec((), "int32")},
            id_keys=("id",),
            **options,
        )
        self.weights = {
            key: jnp.eye(WIDTH) + 0.1 * jax.random.normal(jax.random.key(seed), (WIDTH, WIDTH))
            for seed, key in enumerate(("query", "item"))
        }
        self.state = self.loss_fn.init(jax.random.key(2))
        self.jitted = jax.jit(self.step, donate_argnums=1)

    def step(self, weights, state, batch):
        def loss(weights):
            def network(features):
                embedded = features["x"] @ weights["item"]
                return embedded / jnp.linalg.norm(embedded, axis=1, keepdims=True)

            features = {"x": batch["x"]}
            query = batch["y"] @ weights["query"]
            return self.loss_fn(
                state, network, query, network(features), features, labels={"id": batch["id"]}
            )

        (value, state), gradient = jax.value_and_grad(loss, has_aux=True)(weights)
        return value, state, jax.tree.map(lambda w, g: w - 0.05 * g, weights, gradient)

    def train(self, batches):
        losses = []
        for batch in batches:
            loss, self.state, self.weights = self.jitted(self.weights, self.state, batch)
            losses.append(loss)
        return losses


def batches_of(count):
    rng = np.random.default_rng(0)
    items = rng.normal(size=(200, WIDTH))
    found = []
    for _ in range(count):
        ids = rng.integers(0, len(items), BATCH).astype(np.int32)
        y = items[ids] + 0.3 * rng.normal(size=(BATCH, WIDTH))
        found.append(jax.device_put({"x": items[ids], "y": y / 3, "id": ids}))
    return found


OPTIONS = [
    {},
    {"estimator": "shared", "num_samples": 2},
    {"estimator": "paper", "in_batch_negatives": False, "max_staleness": None},
    {"staleness_correction": True, "margin": 0.5},
    {"estimator": "shared", "top_k": 64},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_training_is_that_of_the_host(options):
    here = Training(**options).train(batches_of(20))
    with jax.default_device(jax.devices("cpu")[0]):
        there = Training(**options).train(batches_of(20))
    assert {each.device.platform for each in here} == {PLATFORM}
    np.testing.assert_allclose(here, there, rtol=1e-7)
    assert float(here[-1]) > 0


def test_a_resumed_training_goes_on(tmp_path):
    batches, training, resumed = batches_of(20), Training(), Training()
    training.train(batches[:10])
    training.loss_fn.save(training.state, tmp_path / "cache")
    resumed.state = resumed.loss_fn.load(resumed.state, tmp_path / "cache")
    resumed.weights = jax.tree.map(jnp.array, training.weights)
    expected, found = training.train(batches[10:]), resumed.train(batches[10:])
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    ages = [each.state.caches["cache"].age for each in (training, resumed)]
    np.testing.assert_array_equal(*ages)


def test_a_jitted_step_moves_nothing_to_or_from_the_device():
    training, batches = Training(staleness_correction=True), batches_of(6)
    training.train(batches[:2])
    with jax.transfer_guard("disallow"):
        training.train(batches[2:])


@pytest.mark.parametrize("case", ["paper", "exact_query", "unchecked"])
def test_shards_on_two_devices_are_the_one_big_cache(case):
    if PLATFORM != "cpu" and jax.device_count() < 2:
        pytest.skip(f"here is {jax.device_count()} GPU: shards on two were not run in JAX")
    environment = {
        "CUDA_VISIBLE_DEVICES": "0,1",
        "JAX_PLATFORMS": "cuda" if PLATFORM == "gpu" else PLATFORM,
        "JAX_ENABLE_X64": "1",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2" if PLATFORM == "cpu" else "",
        "PYTHONPATH": os.pathsep.join([str(SHARDS.parents[2]), *sys.path]),
    }
    done = programs.run(SHARDS, case, timeout=550, tail=8000, **environment)
    assert done.stdout.splitlines() == [f"{case} on 2 devices: done"]
