"""A loss with fused=True is the loss without it, in JAX; the kernel is interpreted."""

import jax
import jax.numpy as jnp
import negcache_jax as negcache
import numpy as np
import pytest
from negcache_jax import _backend, _fused

WITH_KERNEL = pytest.mark.skipif(
    not hasattr(_fused.triton, "load"), reason="the kernel needs JAX 0.8 or newer"
)
SLOTS, WIDTH, ROWS, VOCABULARY = 200, 12, 6, 40
EVERYTHING = {
    "estimator": "exact_query",
    "num_samples": 2,
    "id_keys": ("id",),
    "group_key": "group",
    "margin": 0.5,
    "log_frequency_key": "frequency",
}
# How far gradients may be off: the readout's probabilities are rounded to the rows' dtype.
NEAR = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 1e-3, "int8": 1e-2}


@pytest.fixture
def _interpreted(monkeypatch):
    monkeypatch.setenv("NEGCACHE_PALLAS_INTERPRET", "1")


def loss_of(dtype="float32", **options):
    return negcache.NegativeCacheLoss(
        SLOTS,
        {"token": negcache.FieldSpec((), "int32")},
        negcache.FieldSpec((WIDTH,), dtype),
        scale=3.0,
        labels={
            "id": negcache.FieldSpec((), "int32"),
            "group": negcache.FieldSpec((), "int32"),
            "frequency": negcache.FieldSpec((), "float32"),
        },
        **options,
    )


def batch_of(rng, rows):
    return {
        "token": rng.integers(0, VOCABULARY, rows).astype(np.int32),
        "id": rng.integers(0, 30, rows).astype(np.int32),
        "group": rng.integers(0, 2, rows).astype(np.int32),
        "frequency": rng.standard_normal(rows).astype(np.float32),
    }


def trained(loss_fn, steps=3):
    """Return losses, gradients and rows of some steps with a moving tower, from a full cache."""
    rng = np.random.default_rng(0)
    params = jnp.asarray(rng.standard_normal((VOCABULARY, WIDTH)), jnp.float32) / 3
    queries = jnp.asarray(rng.standard_normal((steps, ROWS, WIDTH)), jnp.float32)
    state = loss_fn.init(jax.random.key(1))
    state = loss_fn.prefill(state, lambda rows: params[rows["token"]], batch_of(rng, SLOTS), 64)

    def value(params, state, query, features):
        def tower(rows):
            return params[rows["token"]]

        return loss_fn(state, tower, query, tower(features), features)

    step = jax.jit(jax.value_and_grad(value, has_aux=True))
    found = []
    for query in queries:
        (loss, state), gradient = step(params, state, query, batch_of(rng, ROWS))
        params = params - 0.1 * gradient
        found.append((loss, gradient))
    return *zip(*found, strict=True), state.caches["cache"].data["embedding"]


@WITH_KERNEL
@pytest.mark.usefixtures("_interpreted")
@pytest.mark.parametrize("dtype", NEAR)
@pytest.mark.parametrize(
    "options", [EVERYTHING, {"estimator": "shared"}], ids=["everything", "shared"]
)
def test_steps_are_those_of_the_plain_loss(dtype, options, monkeypatch):
    """Where a device multiplies rows as they are stored, which JAX's CPU can do too."""
    monkeypatch.setattr(_backend.JaxBackend, "multiplies_as_stored", lambda self, table: True)
    if dtype != "float32" and options is not EVERYTHING:
        return
    fused, plain = (trained(loss_of(dtype, fused=each, **options)) for each in (True, False))
    for ours, theirs in zip(fused[0], plain[0], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    for ours, theirs in zip(fused[1], plain[1], strict=True):
        error = jnp.linalg.norm(ours - theirs) / jnp.linalg.norm(theirs)
        assert error < NEAR[dtype]


@pytest.mark.usefixtures("_interpreted")
def test_the_kernel_is_what_scores(monkeypatch):
    def broken(self, *arrays, **facts):
        raise AssertionError("called")

    monkeypatch.setattr(_backend.JaxBackend, "fused_block_weights", broken)
    with pytest.raises(AssertionError, match="called"):
        trained(loss_of(fused=True))
    trained(loss_of(fused=False))


@WITH_KERNEL
def test_a_cpu_is_refused_in_words():
    with pytest.raises(
        negcache.OptionError,
        match="fused=True on platform 'cpu': the kernel compiles for GPUs only",
    ):
        trained(loss_of(fused=True))


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 4},
        {"retrieval_fn": negcache.MaxScoreRetrievalFn()},
        {"score_transform": jnp.tanh},
        {"matryoshka_dims": (4, 12)},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_the_kernel_does_not_know_is_refused_in_words(options):
    with pytest.raises(
        negcache.OptionError, match=f"fused=True does not work with {next(iter(options))}"
    ):
        loss_of(fused=True, **options)


def test_float64_is_refused_in_words():
    loss_fn = loss_of("float64", fused=True)
    state = loss_fn.init(jax.random.key(0))
    rng = np.random.default_rng(0)
    query, features = jnp.asarray(rng.standard_normal((ROWS, WIDTH))), batch_of(rng, ROWS)

    def tower(rows):
        return jnp.ones((len(rows["token"]), WIDTH))

    with pytest.raises(negcache.DTypeError, match="fused=True is for float32 and smaller"):
        loss_fn(state, tower, query, tower(features), features)
