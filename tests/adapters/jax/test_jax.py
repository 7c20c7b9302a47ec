"""What is JAX's own: explicit state, keys, donation instead of copies, vmap, and 32-bit mode."""

import jax
import jax.numpy as jnp
import negcache_jax as negcache
import numpy as np
import programs
import pytest
from laws import chi_square_is_plausible
from negcache_jax._replicas import MeshAxis

from negcache_core.retrieval.softmax_draw import draw_from_softmax

WIDTH = 4


def handler_of(capacity=8, **options):
    specs = {
        "x": negcache.FieldSpec((WIDTH,), jnp.float32),
        "embedding": negcache.FieldSpec((WIDTH,), jnp.float32),
    }
    return negcache.CacheLossHandler(
        negcache.CacheManager(specs, capacity),
        negcache.CacheClassificationLoss("embedding", ("x",), **options),
        embedding_key="embedding",
        data_keys=("x",),
    )


def step_of(handler):
    def step(weights, state, query, x):
        def network(features):
            return features["x"] @ weights

        features = {"x": x}
        return handler.update_cache_and_compute_loss(
            state, network, query, network(features), features
        )

    return step


def batch(seed, rows=3):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.standard_normal((rows, WIDTH)), jnp.float32) for _ in range(2))


def test_value_and_grad_under_jit_is_the_eager_step():
    handler = handler_of(scale=2.0)
    weights = jnp.eye(WIDTH, dtype=jnp.float32)
    both = jax.value_and_grad(step_of(handler), has_aux=True)
    traces = []

    def counted(*arguments):
        traces.append(1)
        return both(*arguments)

    compiled = jax.jit(counted)
    eager_state = compiled_state = handler.init(jax.random.key(0))
    for seed in range(4):
        (ours, eager_state), mine = both(weights, eager_state, *batch(seed))
        (theirs, compiled_state), other = compiled(weights, compiled_state, *batch(seed))
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-6)
        assert (float(ours) > 0) == (seed > 0)
    assert len(traces) == 1
    for ours, theirs in zip(
        jax.tree.leaves(eager_state.caches), jax.tree.leaves(compiled_state.caches), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_a_step_changes_no_state_but_what_it_returns():
    handler = handler_of()
    state = handler.init(jax.random.key(0))
    before = jax.tree.map(np.array, state.caches)
    loss, after = step_of(handler)(jnp.eye(WIDTH), state, *batch(0))
    again, _ = step_of(handler)(jnp.eye(WIDTH), state, *batch(0))
    assert float(loss) == float(again)
    for ours, theirs in zip(jax.tree.leaves(state.caches), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert int((after.caches["cache"].age == 0).sum()) == 3
    assert handler.metrics == {}


def test_a_donated_table_is_written_where_it_is():
    """The table's buffer is the same before and after, and the step needs no room for another."""
    capacity = 2**17
    handler = handler_of(capacity, tile_bytes=2**18)
    step = jax.jit(jax.value_and_grad(step_of(handler), has_aux=True), donate_argnums=1)
    state = handler.init(jax.random.key(0))
    table_bytes = capacity * WIDTH * 4
    pointer = state.caches["cache"].data["embedding"].unsafe_buffer_pointer()
    compiled = step.lower(jnp.eye(WIDTH), state, *batch(0)).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= 2 * table_bytes
    assert memory.temp_size_in_bytes < table_bytes
    for seed in range(2):
        (_, state), _ = step(jnp.eye(WIDTH), state, *batch(seed))
    assert state.caches["cache"].data["embedding"].unsafe_buffer_pointer() == pointer


def test_keys_drive_the_draw():
    rng = np.random.default_rng(0)
    rows = jnp.asarray(rng.standard_normal((300, 2)))
    query = jnp.asarray(rng.standard_normal((1, 2)))
    loss = negcache.CacheClassificationLoss("e", ("e",), num_samples=20_000)
    cache = negcache.NegativeCache({"e": rows}, jnp.zeros(300, jnp.int32))
    one, two, other = (
        np.asarray(loss.retrieve(query, cache, key=jax.random.key(seed)).slots)
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, two)
    assert (one != other).any()
    law = np.exp(np.asarray(query @ rows.T)[0])
    assert chi_square_is_plausible(np.bincount(one, minlength=300), law / law.sum())


def test_gumbel_retrieval_takes_the_losss_keys():
    loss = negcache.CacheClassificationLoss(
        "e", ("e",), retrieval_fn=negcache.GumbelMaxRetrievalFn()
    )
    cache = negcache.NegativeCache({"e": jnp.zeros((50, 2))}, jnp.zeros(50, jnp.int32))
    query = jnp.zeros((40, 2))
    draws = [
        np.asarray(loss.retrieve(query, cache, key=jax.random.key(seed)).slots) for seed in (0, 1)
    ]
    assert (draws[0] != draws[1]).any()
    assert len(np.unique(draws[0])) > 10


def test_hidden_random_state_is_refused():
    with pytest.raises(negcache.KindError, match="JAX keeps no hidden random state"):
        negcache.CacheClassificationLoss("e", ("e",), generator=0)
    cache = negcache.NegativeCache({"e": jnp.zeros((5, 2))}, jnp.zeros(5, jnp.int32))
    with pytest.raises(negcache.OptionError, match="pass key="):
        negcache.CacheClassificationLoss("e", ("e",)).retrieve(jnp.zeros((1, 2)), cache)


def test_the_pure_parts_can_be_mapped():
    rng = np.random.default_rng(0)
    scores = jnp.asarray(rng.standard_normal((4, 2, 300)))
    noise = jnp.asarray(rng.random((4, 2, 3, 2)))
    slots, log_partition = jax.vmap(draw_from_softmax)(scores, noise)
    for row in range(4):
        ours = draw_from_softmax(scores[row], noise[row])
        np.testing.assert_array_equal(slots[row], ours[0])
        np.testing.assert_allclose(log_partition[row], ours[1], rtol=1e-12)


IN_32_BITS = """
import jax, jax.numpy as jnp, numpy as np
import negcache_jax as negcache

specs = {"id": negcache.FieldSpec((), jnp.int32),
         "embedding": negcache.FieldSpec((8,), jnp.bfloat16)}
handler = negcache.CacheLossHandler(
    negcache.CacheManager(specs, 300), negcache.CacheClassificationLoss("embedding", ("id",)),
    embedding_key="embedding", data_keys=("id",),
    new_items_filter=negcache.IsInCacheFilterFn(("id",)))

def step(table, state, ids, query):
    network = lambda features: table[features["id"]]
    features = {"id": ids}
    return handler.update_cache_and_compute_loss(state, network, query, network(features), features)

compiled = jax.jit(jax.value_and_grad(step, has_aux=True), donate_argnums=1)
table = jax.random.normal(jax.random.key(1), (500, 8))
state = handler.init(jax.random.key(0))
for number in range(5):
    ids = jnp.arange(40) + 30 * number
    (loss, state), gradient = compiled(table, state, ids, table[ids])
written = state.caches["cache"].age != negcache.EMPTY
assert int(written.sum()) == 160, written.sum()  # 40 new items, then 30 a step
assert loss.dtype == jnp.float32 and np.isfinite(float(loss)) and float(loss) > 0
assert np.isfinite(np.asarray(gradient)).all()
print("fine in 32 bits")
"""


def test_jax_without_64_bit_types():
    out = programs.run("-W", "error", "-c", IN_32_BITS)
    assert out.stdout.strip() == "fine in 32 bits"


@pytest.mark.parametrize("group", [None, (), 3, ("data", 1), np.zeros(2)], ids=str)
def test_a_group_that_names_no_axis_is_refused_in_words(group):
    with pytest.raises(negcache.KindError, match="expected the name of a mesh axis"):
        MeshAxis(group)
