"""Towers and caches in half precision: the loss is float32's, within bounds that are derived.

u is the unit roundoff of a dtype: a number is rounded to it with a relative error of at most u.
"""

import contextlib
import functools
import itertools

import jax
import jax.numpy as jnp
import keras
import negcache_jax
import negcache_tensorflow
import negcache_torch
import numpy as np
import optax
import pytest
import tensorflow as tf
import torch
from backends import BACKENDS

from negcache_core import CacheManager, FieldSpec, NegativeCache
from negcache_core.cache.plans import oldest_written, plan_reembed

U = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 0.0}
TINY = {"float16": 2.0**-25, "bfloat16": 0.0, "float32": 0.0}  # half of the smallest float16
ROWS, SLOTS, WIDTH, SCALE = 6, 200, 8, 5.0

# The greatest power of exp(score) that a weight is a product of: how many scores' errors it has.
OPTIONS = [
    (2, {"estimator": "paper", "num_samples": 2}),
    (2, {"estimator": "paper", "top_k": 5, "in_batch_negatives": True}),
    (4, {"estimator": "shared", "id_key": "id", "in_batch_negatives": True, "num_samples": 2}),
    (4, {"estimator": "shared", "top_k": 7, "score_transform": lambda scores: 0.5 * scores}),
    (4, {"estimator": "exact_query"}),
    (4, {"estimator": "exact_query", "id_key": "id", "in_batch_negatives": True}),
    (12, {"estimator": "paper", "num_samples": 3, "staleness_correction": True}),
    (18, {"estimator": "exact_query", "in_batch_negatives": True, "staleness_correction": True}),
]
DTYPES = [(tower, stored) for tower in U for stored in U if (tower, stored) != ("float32",) * 2]


def unit(rng, *shape):
    rows = rng.standard_normal(shape)
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


class Problem:
    """Unit embeddings in float32: what the towers would return, and what the cache would hold."""

    def __init__(self, backend, options):
        rng = np.random.default_rng(0)
        drawn = unit(rng, ROWS * options.get("num_samples", 1), WIDTH)
        self.leaves = [unit(rng, ROWS, WIDTH), unit(rng, ROWS, WIDTH), drawn, np.float32(SCALE)]
        self.table = unit(rng, SLOTS, WIDTH)
        self.ids = rng.integers(0, 9, SLOTS), rng.integers(0, 9, ROWS)
        self.noise = rng.random((ROWS, options.get("num_samples", 1), 2))
        self.backend, self.options = backend, options
        self.age = backend.to_native(np.zeros(SLOTS, np.int32))
        self.xp = backend.module.CacheLossHandler.backend.xp

    def cast(self, array, *names):
        for name in names:
            array = self.xp.astype(array, getattr(self.xp, name))
        return array

    def rounded(self, array, *names):
        return self.backend.to_numpy(self.cast(self.backend.to_native(array), *names, "float32"))

    def step(self, tower, stored, inside=contextlib.nullcontext):
        """Return a function of the table and the leaves: the step's result, and its gradients."""
        native, options = self.backend.to_native, self.options
        ids, features = native(self.ids[0]), dict.fromkeys(("x", "id"), native(self.ids[1]))

        def result(table, query, positive, drawn, scale):
            table = self.cast(table, tower, stored)
            loss = self.backend.module.CacheClassificationLoss(
                "embedding", ("x",), scale=lambda: scale, tile_bytes=1, **options
            )
            with inside():
                return loss(
                    lambda features: self.cast(drawn, tower),
                    self.cast(query, tower),
                    self.cast(positive, tower),
                    NegativeCache({"embedding": table, "x": ids, "id": ids}, self.age),
                    pos_features=features,
                    noise=native(self.noise),
                )

        if self.backend.name == "jax":
            return jax.jit(differentiated(result))

        def both(table, *leaves):
            found = []

            def value(*leaves):
                found.append(result(table, *leaves))
                return found[0].loss

            gradients = self.backend.gradients(value, leaves)
            return found[0], gradients

        return both

    def run(self, step, leaves, table):
        native = self.backend.to_native
        out, gradients = step(native(table), *(native(each) for each in leaves))
        return out, [np.asarray(each) for each in gradients]


def differentiated(result):
    def loss_of(leaves, table):
        out = result(table, *leaves)
        return out.loss, out

    def step(table, *leaves):
        (_, out), gradients = jax.value_and_grad(loss_of, has_aux=True)(leaves, table)
        return out, gradients

    return step


def assert_within(error, bound, what):
    assert error <= bound, f"{what}: {error:.3g} beyond {bound:.3g}"


def check(name, power, options, tower, stored, inside=contextlib.nullcontext):
    backend = BACKENDS[name]
    problem, numpy = Problem(backend, options), backend.to_numpy
    half, single = problem.step(tower, stored, inside), problem.step("float32", "float32")
    out, gradients = problem.run(half, problem.leaves, problem.table)
    values = [out.loss, out.interpretable_loss, out.staleness, *out.metrics.values()]
    assert {"float32" in str(value.dtype) for value in values} == {True}
    assert stored in str(out.updated_item_data["embedding"].dtype)

    # The same numbers in float32 give the same loss, and its gradients before they are rounded.
    leaves = [problem.rounded(leaf, tower) for leaf in problem.leaves[:3]] + problem.leaves[3:]
    table = problem.rounded(problem.table, tower, stored)
    wide, wide_gradients = problem.run(single, leaves, table)
    np.testing.assert_array_equal(*(numpy(o.updated_item_indices) for o in (out, wide)))
    np.testing.assert_allclose(numpy(out.loss), numpy(wide.loss), rtol=1e-5)
    for mine, exactly, rounding in zip(gradients, wide_gradients, [1, 1, 1, 0], strict=True):
        noise = 1e-5 * np.abs(exactly).max() + rounding * TINY[tower]
        bound = rounding * U[tower] * np.abs(exactly) + noise
        assert_within((np.abs(mine - exactly) - bound).max(), 0, "gradient")

    # Against towers and cache in float32: the bounds that the documentation states.
    full, full_gradients = problem.run(single, problem.leaves, problem.table)
    if (numpy(full.updated_item_indices) != numpy(out.updated_item_indices)).any():
        return False  # another row was drawn: there is no gradient to compare
    rho = (1 + U[tower]) ** 2 * (1 + U[stored]) - 1
    epsilon = SCALE * rho + 1e-6
    assert_within(abs(numpy(out.loss) - numpy(full.loss)), 2 * epsilon, "loss")
    growth = (1 + rho) * (1 + U[tower]) * np.exp(power * epsilon) - 1
    total = (2 + 2 * numpy(full.metrics["mean_weight"])) * growth
    differences = [
        np.linalg.norm(np.atleast_1d(ours - theirs), axis=-1).sum()
        for ours, theirs in zip(gradients, full_gradients, strict=True)
    ]
    query, positive, drawn, scale = differences
    assert_within(query, SCALE * total, "query")
    assert_within(positive + drawn, SCALE * total, "items")
    assert_within(scale, total, "scale")
    return True


def autocast(tower):
    if tower == "float32":
        return contextlib.nullcontext
    return lambda: torch.autocast("cpu", getattr(torch, tower))


CASES = [(*option, *dtypes) for option in OPTIONS for dtypes in DTYPES]


@pytest.mark.parametrize(
    ("name", "cases"),
    # Every third: each option with several pairs of dtypes, and each pair with several options.
    [("torch", CASES[::3]), ("tensorflow", CASES[1::3]), ("jax", [CASES[20], CASES[36]])],
    ids=["torch", "tensorflow", "jax"],
)
def test_half_precision_is_float32_of_rounded_numbers_and_stays_within_its_bounds(name, cases):
    """In PyTorch inside of autocast, with towers in half precision."""
    compared = [
        check(name, *case, inside=autocast(case[2]) if name == "torch" else contextlib.nullcontext)
        for case in cases
    ]
    assert sum(compared) >= len(cases) / 2


class Law:
    """What ages and features must be, first in, first out: NumPy's, told which rows were finite."""

    def __init__(self, capacity):
        self.manager = CacheManager({"x": FieldSpec((4,), "float32")}, capacity, use_lru=False)
        self.cache = self.manager.init_cache()

    def step(self, x, finite):
        self.cache = self.manager.update_cache(
            self.cache, new_items={"x": x}, new_items_mask=finite
        )

    def refresh(self, n):
        slots, live = oldest_written(self.cache.age, n)
        age = plan_reembed(self.cache.age, slots, live, live).age
        self.cache = self.cache._replace(age=age)

    def check(self, cache):
        np.testing.assert_array_equal(np.asarray(cache.age), self.cache.age)
        np.testing.assert_array_equal(np.asarray(cache.data["x"]), self.cache.data["x"])


def batches(steps, overflowing):
    """Yield features (6, 4); in some steps the first two rows overflow float16 in the tower."""
    rng = np.random.default_rng(0)
    for number in range(steps):
        x = rng.standard_normal((ROWS, 4)).astype(np.float32)
        x[:2] *= 1e5 if number in overflowing else 1.0
        yield number, x


def handler_of(module, stored, **options):
    specs = {"x": module.FieldSpec((4,), "float32"), "e": module.FieldSpec((WIDTH,), stored)}
    return module.CacheLossHandler(
        module.CacheManager(specs, 20, use_lru=False),
        module.CacheClassificationLoss("e", ("x",), **options),
        embedding_key="e",
        data_keys=("x",),
    )


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_a_loss_scale_that_overflows_leaves_the_cache_lawful_and_training_sound(stored):
    """PyTorch's GradScaler: every step is one of the cache, also where the optimizer skips it."""
    torch.manual_seed(0)
    estimator = {"float32": "paper", "bfloat16": "shared", "float16": "exact_query"}[stored]
    log_scale = torch.nn.Parameter(torch.tensor(1.0))
    handler = handler_of(
        negcache_torch,
        stored,
        estimator=estimator,
        scale=log_scale.exp,
        in_batch_negatives=True,
        generator=0,
    )
    tower, query_tower = torch.nn.Linear(4, WIDTH), torch.nn.Linear(4, WIDTH)
    parameters = [log_scale, *tower.parameters(), *query_tower.parameters()]
    optimizer = torch.optim.Adam(parameters, 1e-2)
    scaler = torch.amp.GradScaler(
        "cpu", init_scale=2.0**40, backoff_factor=2.0**-8, growth_factor=2.0**12, growth_interval=4
    )
    law, skipped, scales = Law(20), 0, []
    for number, x in batches(24, overflowing={9, 14}):
        inputs, before = torch.as_tensor(x), tower.weight.detach().clone()
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            items, queries = tower(inputs), query_tower(inputs.clamp(-9, 9))
            loss = handler.update_cache_and_compute_loss(
                lambda data: tower(data["x"]), queries, items, {"x": inputs}
            )
        finite = torch.isfinite(items).all(1).numpy()
        assert finite.sum() == (ROWS - 2 if number in {9, 14} else ROWS)
        assert loss.dtype == torch.float32
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        sound = all(torch.isfinite(each.grad).all() for each in parameters)
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, tower.weight) == (not sound)
        skipped += not sound
        scales.append(scaler.get_scale())
        law.step(x, finite)
        law.check(handler.cache)
        assert torch.isfinite(handler.cache.data["e"]).all()
    assert 6 <= skipped <= 16  # both ways were taken: at first, after growing, with infinite rows
    assert any(after > before for before, after in itertools.pairwise(scales))
    state = [each for group in optimizer.state.values() for each in group.values()]
    assert all(torch.isfinite(each).all() for each in [*parameters, *state])


def test_rows_beyond_the_stored_dtypes_range_do_not_enter():
    """bfloat16 holds 1e5 and float16 does not."""
    handler = handler_of(negcache_torch, "float16", generator=0)
    x = torch.ones(3, 4)
    items = torch.ones(3, WIDTH, dtype=torch.bfloat16)
    items[1] = 1e5
    loss = handler.update_cache_and_compute_loss(lambda data: items, items, items, {"x": x})
    assert torch.isfinite(loss)
    assert int((handler.cache.age == 0).sum()) == 2
    assert handler.metrics["nonfinite_count"] == 1


@pytest.mark.parametrize(
    ("policy", "jit_compile"), [("mixed_float16", False), ("mixed_bfloat16", True)]
)
def test_keras_policies_train_in_one_trace_with_refresh_inside(policy, jit_compile):
    """float16 with LossScaleOptimizer, of which the first scales overflow; bfloat16 under XLA."""
    keras.utils.set_random_seed(0)
    scaled = policy == "mixed_float16"
    scale = tf.Variable(2.0)
    handler = handler_of(
        negcache_tensorflow,
        "float16" if scaled else "bfloat16",
        estimator="exact_query" if scaled else "shared",
        scale=scale,
        in_batch_negatives=True,
        generator=0,
    )
    tower, query_tower = (
        keras.layers.Dense(WIDTH, dtype=keras.DTypePolicy(policy)) for _ in range(2)
    )
    tower.build((None, 4)), query_tower.build((None, 4))
    weights = tower.trainable_variables + query_tower.trainable_variables
    optimizer = keras.optimizers.SGD(0.05)
    if scaled:
        optimizer = keras.optimizers.LossScaleOptimizer(
            optimizer, initial_scale=2.0**22, dynamic_growth_steps=8
        )
    optimizer.build(weights)

    @tf.function(jit_compile=jit_compile, input_signature=[tf.TensorSpec([None, 4], tf.float32)])
    def step(x):
        with tf.GradientTape() as tape:
            items, queries = tower(x), query_tower(tf.clip_by_value(x, -9.0, 9.0))
            loss = handler.update_cache_and_compute_loss(
                lambda data: tower(data["x"]), queries, items, {"x": x}
            )
            target = optimizer.scale_loss(loss)
        gradients = tape.gradient(target, [*weights, scale])
        optimizer.apply(gradients[:-1], weights)
        handler.refresh(lambda data: tower(data["x"]), 2)
        sound = [tf.reduce_all(tf.math.is_finite(each)) for each in gradients]
        return loss, tf.reduce_all(tf.math.is_finite(items), 1), tf.reduce_all(tf.stack(sound))

    law, skipped = Law(20), 0
    for number, x in batches(14, overflowing={9, 11} if scaled else ()):
        before = tower.kernel.numpy()
        rows = x[number % 2 :] if scaled else x  # XLA makes a program for each size
        loss, finite, sound = step(tf.constant(rows))
        assert loss.dtype == tf.float32
        assert finite.numpy().all() == (number not in {9, 11} or not scaled)
        assert np.array_equal(before, tower.kernel.numpy()) == (not sound)
        skipped += not sound
        law.step(rows, finite.numpy())
        law.refresh(2)
        law.check(handler.cache)
        assert np.isfinite(handler.cache.data["e"].numpy().astype(np.float32)).all()
    assert (3 <= skipped <= 10) if scaled else skipped == 0
    assert all(np.isfinite(each.numpy()).all() for each in weights)
    assert step.experimental_get_tracing_count() == 1


def test_bfloat16_in_jax_trains_in_one_donated_program_with_refresh_inside():
    jax.clear_caches()  # after many tests it keeps no new program, and none could be counted
    handler = handler_of(
        negcache_jax, "bfloat16", estimator="exact_query", scale=2.0, in_batch_negatives=True
    )
    optimizer = optax.adam(1e-2)

    def network(weights):
        return lambda data: data["x"].astype(jnp.bfloat16) @ weights.astype(jnp.bfloat16)

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def step(weights, slow, state, x):
        def loss_of(weights, state):
            items = network(weights)({"x": x})
            return handler.update_cache_and_compute_loss(
                state, network(weights), items, items, {"x": x}
            )

        (loss, state), gradient = jax.value_and_grad(loss_of, has_aux=True)(weights, state)
        updates, slow = optimizer.update(gradient, slow)
        state = handler.refresh(state, network(weights), 2)
        return optax.apply_updates(weights, updates), slow, state, loss, gradient

    weights = jnp.asarray(unit(np.random.default_rng(1), 4, WIDTH))
    slow, state, law = optimizer.init(weights), handler.init(jax.random.key(0)), Law(20)
    for _, x in batches(12, overflowing=()):
        weights, slow, state, loss, gradient = step(weights, slow, state, jnp.asarray(x))
        assert loss.dtype == gradient.dtype == jnp.float32
        assert jnp.isfinite(loss)
        assert jnp.isfinite(gradient).all()
        law.step(x, np.ones(ROWS, bool))
        law.refresh(2)
        law.check(state.caches["cache"])
    assert step._cache_size() == 1
    assert state.caches["cache"].data["e"].dtype == jnp.bfloat16
