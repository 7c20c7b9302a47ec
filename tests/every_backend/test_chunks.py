"""A network in chunks is the network: its values, its gradients and a whole step, on every backend.

The gradients are compared in float64 to rounding, for chunks of one row, of some, and of all.
"""

import functools
import gc
import weakref
from typing import NamedTuple

import negcache_torch
import numpy as np
import pytest
import torch
from backends import BACKENDS, JAX, JAX_JIT, NUMPY, TENSORFLOW, TENSORFLOW_GRAPH, TENSORFLOW_XLA
from torch_backend import TORCH

from negcache_core import ShapeError

EXACT = {"rtol": 1e-12, "atol": 1e-12}
DIFFERENTIATING = (TORCH, TENSORFLOW, TENSORFLOW_GRAPH, TENSORFLOW_XLA, JAX, JAX_JIT)
D = 3


class Pair(NamedTuple):
    """A structure with names of its own."""

    left: object
    right: object


def backend_name(backend):
    return backend.name


def chunks(backend, network, size):
    return network if size is None else backend.module.in_chunks(network, size)


def data(rows):
    rng = np.random.default_rng(rows)
    return {
        "x": rng.standard_normal((rows, D)),
        "id": rng.integers(0, 5, rows).astype(np.int32),
    }, {"weights": rng.standard_normal((D, D)), "table": rng.standard_normal((5, D))}


def embed(backend, weights, table, rows):
    """A tower of two layers over a table, of one row each."""
    xp = backend.module.CacheManager.backend.xp
    hidden = xp.matmul(rows["x"] + xp.take_rows(table, rows["id"]), weights)
    return xp.matmul(hidden * hidden * hidden, weights)


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=backend_name)
def test_values_are_those_of_the_whole_batch(backend):
    for rows, sizes in ((7, (1, 3, 7, 100)), (6, (2,)), (1, (2,))):
        features, constants = data(rows)

        def outputs(state, batch, sizes=sizes):
            network = functools.partial(embed, backend, state["weights"], state["table"])
            return tuple(chunks(backend, network, size)(batch) for size in (None, *sizes))

        whole, *parts = backend.replay(outputs, constants, features)
        assert whole.shape == (rows, D)
        for part in parts:
            np.testing.assert_allclose(part, whole, **EXACT)


# XLA compiles the body of the loop also where no row goes through it, and cannot for unknown sizes.
@pytest.mark.parametrize(
    "backend", [each for each in BACKENDS.values() if each is not TENSORFLOW_XLA], ids=backend_name
)
def test_no_rows_have_no_embeddings(backend):
    features, constants = data(0)

    def outputs(state, batch):
        network = functools.partial(embed, backend, state["weights"], state["table"])
        return chunks(backend, network, 2)(batch)

    assert backend.replay(outputs, constants, features).shape == (0, D)


def surrogate(backend, size, x, weights, table, ids, upstream):
    # Through a product, so that TensorFlow's gradient of the table is no sparse one.
    network = functools.partial(embed, backend, weights, table * 1.0)
    return backend.module.CacheManager.backend.xp.sum(
        chunks(backend, network, size)({"x": x, "id": ids}) * upstream
    )


@pytest.mark.parametrize("backend", DIFFERENTIATING, ids=backend_name)
def test_gradients_are_those_of_the_whole_batch_also_of_what_the_network_closes_over(backend):
    for rows, sizes in ((7, (1, 3, 7, 9)), (6, (2,))):
        features, constants = data(rows)
        upstream = np.random.default_rng(99).standard_normal((rows, D))
        x, weights, table, ids, up = backend.native(
            (features["x"], *constants.values(), features["id"], upstream)
        )
        whole, *parts = (
            backend.gradients(
                functools.partial(surrogate, backend, size), [x, weights, table], ids, up
            )
            for size in (None, *sizes)
        )
        for part in parts:
            for ours, theirs in zip(part, whole, strict=True):
                np.testing.assert_allclose(ours, theirs, **EXACT)


@pytest.mark.parametrize("backend", DIFFERENTIATING, ids=backend_name)
def test_no_rows_have_a_gradient_of_zero(backend):
    if backend is TENSORFLOW_XLA:
        backend = TENSORFLOW_GRAPH  # whose sizes are known to it, as here: see above
    features, constants = data(0)
    x, weights, table, ids, up = backend.native(
        (features["x"], *constants.values(), features["id"], np.zeros((0, D)))
    )
    found = backend.gradients(
        functools.partial(surrogate, backend, 2), [x, weights, table], ids, up
    )
    for gradient, array in zip(found, (x, weights, table), strict=True):
        np.testing.assert_array_equal(gradient, np.zeros(array.shape))


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=backend_name)
def test_any_nested_structure_of_arrays_goes_in(backend):
    features, _ = data(5)

    def outputs(_, batch):
        def network(rows):
            first, rest = rows["list"]
            assert rest["none"] is None
            assert isinstance(rows, dict)
            assert isinstance(rows["list"], list)
            left, right = rows["pair"].left, rows["pair"].right
            return first + rest["tuple"][0] * left + right

        x = batch["x"]
        arguments = {"list": [x, {"tuple": (x,), "none": None}], "pair": Pair(x, x)}
        single = backend.module.in_chunks(lambda rows: rows * 2.0, 2)
        return network(arguments), backend.module.in_chunks(network, 2)(arguments), single(x)

    whole, parts, single = backend.replay(outputs, {}, features)
    np.testing.assert_allclose(parts, whole, **EXACT)
    np.testing.assert_allclose(single, 2 * features["x"], **EXACT)


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=backend_name)
def test_the_network_sees_at_most_so_many_rows_at_a_time(backend):
    features, _ = data(7)
    seen = []

    def outputs(_, batch):
        def network(rows):
            seen.append(rows["x"].shape[0])
            return rows["x"]

        return backend.module.in_chunks(network, 3)(batch)

    backend.replay(outputs, {}, features)
    assert {size for size in seen if size is not None} <= {1, 3}
    assert seen.count(3) <= 2


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=backend_name)
def test_an_output_without_a_row_for_each_row_is_refused(backend):
    xp = backend.module.CacheManager.backend.xp
    features, _ = data(6)
    pooled = backend.module.in_chunks(lambda rows: xp.sum(rows["x"], axis=0), 2)
    message = r"the network returned shape \(3,\) for a chunk of"
    if backend in (TENSORFLOW_GRAPH, TENSORFLOW_XLA):
        # How many rows there are is not known there: an axis too few is.
        pooled = backend.module.in_chunks(lambda rows: xp.sum(rows["x"]), 2)
        message = r"the network returned shape \(\) for a chunk of"
    with pytest.raises(ShapeError, match=message):
        backend.replay(lambda _, batch: pooled(batch), {}, features)


def test_differing_first_sizes_are_told_in_a_trace_that_knows_neither():
    grow = TENSORFLOW_GRAPH.module.in_chunks(lambda rows: rows["x"], 2)
    x, ids = np.zeros((4, 2)), np.zeros(5, np.int32)
    with pytest.raises(Exception, match="assertion failed"):
        TENSORFLOW_GRAPH.replay(lambda _, batch: grow(batch), {}, {"x": x, "id": ids})


STEP_ROWS, SLOTS = 12, 40


@pytest.mark.parametrize("backend", [NUMPY, TORCH, TENSORFLOW, JAX], ids=backend_name)
@pytest.mark.parametrize("estimator", ["paper", "exact_query"])
def test_a_step_in_chunks_is_the_plain_step(backend, estimator):
    """Loss, rows and ages of several steps; the draws are the same, as the cache is."""

    def run(size):
        features, constants = data(STEP_ROWS)
        features, constants = backend.native((features, constants))
        seeded = {} if backend.hold else {"generator": 0}
        loss_fn = backend.module.NegativeCacheLoss(
            SLOTS, features, features["x"], estimator=estimator, num_samples=2, **seeded
        )
        loss_fn = backend.hold(loss_fn, 0) if backend.hold else loss_fn
        plain = functools.partial(embed, backend, constants["weights"], constants["table"])
        tower, found = chunks(backend, plain, size), []
        for step in range(4):
            batch = data(STEP_ROWS)[0]
            batch = backend.native({"x": batch["x"] + step, "id": batch["id"]})
            queries = chunks(backend, lambda x: x * 0.1, size)(batch["x"])
            found.append(loss_fn(tower, queries, tower(batch), batch))
        return backend.numpy((tuple(found), loss_fn.cache))

    whole, parts = run(None), run(5)
    np.testing.assert_array_equal(whole[1].age, parts[1].age)
    np.testing.assert_allclose(whole[0], parts[0], rtol=1e-9)
    for key, rows in whole[1].data.items():
        np.testing.assert_allclose(rows, parts[1].data[key], rtol=1e-9, err_msg=key)


@pytest.mark.parametrize("backend", [TORCH, TENSORFLOW], ids=backend_name)
def test_no_activation_outlives_its_chunk(backend):
    seen = []

    def network(weights):
        def embed(rows):
            alive = [hidden() is not None for hidden in seen]
            assert sum(alive[:-1]) == 0  # the last one's tensors may not be gone yet
            hidden = rows["x"] @ weights
            seen.append(weakref.ref(hidden))
            return hidden * hidden

        return embed

    def function(x, weights):
        embedded = backend.module.in_chunks(network(weights), 2)({"x": x})
        gc.collect()
        assert [hidden() for hidden in seen] == [None] * 4
        return backend.module.CacheManager.backend.xp.sum(embedded)

    features, constants = data(7)
    backend.gradients(function, list(backend.native((features["x"], constants["weights"]))))
    assert len(seen) == 8


def test_nothing_is_computed_again_where_no_gradient_is_taken():
    calls = []

    def network(rows):
        calls.append(len(rows))
        return rows * rows

    x = torch.ones(5, 2, requires_grad=True)
    embedding = negcache_torch.in_chunks(network, 2)(x)
    assert calls == [2, 2, 1]
    embedding.sum().backward()
    assert len(calls) == 6
    calls.clear()
    with torch.no_grad():
        negcache_torch.in_chunks(network, 2)(x)
    assert calls == [2, 2, 1]
