"""Embeddings stored as int8: bad input, and what surrounds a step. The kit checks the rest."""

import copy

import negcache_torch
import numpy as np
import pytest
import torch
from backends import BACKENDS

from negcache_core import EMPTY
from negcache_core.cache.quantized import dequantize, quantize
from negcache_core.cache.restoring import nonfinite_rows

WIDTH, SLOTS = 6, 9
ALL = pytest.mark.parametrize("name", ["numpy", "torch", "tensorflow", "jax"])


def specs_of(module, **more):
    return {
        "x": module.FieldSpec((WIDTH,), "float32"),
        "e": module.FieldSpec((WIDTH,), "int8"),
        **more,
    }


def scaled(module):
    return specs_of(module, e_scale=module.FieldSpec((), "float32"))


def rows_of(backend, count, seed=0):
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((count, WIDTH)).astype(np.float32)
    return {"x": backend.to_native(rows), "e": backend.to_native(rows)}


def handler_of(module=negcache_torch, **options):
    return module.CacheLossHandler(
        module.CacheManager(specs_of(module), SLOTS),
        module.CacheClassificationLoss("e", ("x",), generator=0, **options),
    )


def step(handler, seed=0, rows=3):
    x = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))
    return handler(lambda features: features["x"], x, x, {"x": x})


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_a_value_moves_by_half_a_code_at_most(kind):
    rng = np.random.default_rng(0)
    rows = (rng.standard_normal((500, 16)) * 10.0 ** rng.integers(-4, 4, (500, 1))).astype(kind)
    codes, scale = quantize(rows)
    assert np.abs(codes).max(axis=1).tolist() == [127] * 500
    error = np.abs(dequantize(codes, scale) - rows.astype(np.float32))
    assert (error <= 0.5001 * scale[:, None]).all()


def test_rows_of_zeros_and_tiny_or_huge_rows_stay_finite():
    rows = np.asarray([[0.0, 0.0], [1e-42, -1e-42], [3e38, -1.0], [np.inf, 1.0]], np.float32)
    codes, scale = quantize(rows)
    assert not codes[[0, 3]].any()
    assert np.isfinite(scale).tolist() == [True, True, True, False]
    np.testing.assert_allclose(dequantize(codes[2], scale[2]), [3e38, 0.0], rtol=1e-6)


@ALL
def test_the_largest_number_is_stored_as_one(name):
    backend = BACKENDS[name]
    manager = backend.module.CacheManager(scaled(backend.module), SLOTS)
    row = np.full((1, WIDTH), np.finfo(np.float32).max, np.float32)
    rows = {"x": backend.to_native(row), "e": backend.to_native(row)}
    found = backend.numpy(manager.update_cache(manager.init_cache(), new_items=rows)).data
    np.testing.assert_allclose(found["e"][0] * found["e_scale"][0], row[0], rtol=1e-6)


@ALL
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_with_one_number_that_is_not_finite_has_a_scale_that_is_not(name, bad):
    """Also where a library's maximum passes over NaN, as that of XLA on vectors of a CPU."""
    backend, width = BACKENDS[name], 64
    rows = np.ones((width + 1, width), np.float32)
    rows[np.arange(width), np.arange(width)] = bad
    xp = backend.module.CacheManager.backend.xp
    codes, scale = (backend.numpy(each) for each in quantize(backend.to_native(rows), xp=xp))
    assert np.isfinite(scale).tolist() == [False] * width + [True]
    assert not codes[:-1].any()
    assert (codes[-1] == 127).all()


@ALL
def test_bad_rows_are_refused_in_words_and_change_nothing(name):
    backend = BACKENDS[name]
    module = backend.module
    manager = module.CacheManager(scaled(module), SLOTS)
    cache = manager.update_cache(manager.init_cache(), new_items=rows_of(backend, 3))
    rows = rows_of(backend, 2)
    codes = backend.to_native(np.ones((2, WIDTH), np.int8))
    with pytest.raises(module.DTypeError, match=r"new_items\['e'\] has dtype int8, but its field"):
        manager.update_cache(cache, new_items={**rows, "e": codes})
    with pytest.raises(module.KeysError, match="missing: \\['e'\\]"):
        manager.update_cache(cache, new_items={"x": rows["x"]})
    scale = backend.to_native(np.ones(2, np.float32))
    with pytest.raises(module.DTypeError, match="has dtype float32, but its field stores int8"):
        manager.update_cache(cache, new_items={**rows, "e_scale": scale})
    given = manager.update_cache(cache, new_items={**rows, "e": codes, "e_scale": scale})
    found = backend.numpy(given).data
    assert found["e"][3:5].tolist() == [[1] * WIDTH] * 2
    assert found["e_scale"][3:5].tolist() == [1.0, 1.0]


@ALL
def test_plain_lists_of_ints_are_embeddings_too(name):
    backend = BACKENDS[name]
    manager = backend.module.CacheManager(scaled(backend.module), SLOTS)
    rows = {"x": [[0.0] * WIDTH], "e": [[2, 0, -4, 0, 0, 0]]}
    found = backend.numpy(manager.update_cache(manager.init_cache(), new_items=rows)).data
    np.testing.assert_allclose(found["e"][0] * found["e_scale"][0], rows["e"][0], atol=0.02)


@ALL
def test_a_cache_without_scales_is_refused_in_words(name):
    backend = BACKENDS[name]
    module = backend.module
    cache = module.CacheManager(specs_of(module), SLOTS).init_cache()
    loss = module.CacheClassificationLoss("e", ("x",))
    manager = module.CacheManager(specs_of(module), SLOTS)
    with pytest.raises(module.DTypeError, match="also declare their scales: '<field>_scale', Fi"):
        manager.update_cache(cache, new_items=rows_of(backend, 2))
    query = rows_of(backend, 2)["x"]
    noise = backend.to_native(np.zeros((2, 1, 2)))
    with pytest.raises(module.DTypeError, match=r"add FieldSpec.*named 'e_scale'"):
        loss.retrieve(query, cache, noise=noise)


def test_a_second_cache_without_scales_is_refused_in_words():
    caches = {
        name: negcache_torch.CacheManager(specs, SLOTS).init_cache()
        for name, specs in (("a", scaled(negcache_torch)), ("b", specs_of(negcache_torch)))
    }
    loss = negcache_torch.CacheClassificationLoss("e", ("x",))
    with pytest.raises(negcache_torch.DTypeError, match="a cache has no scales for it"):
        loss.retrieve(torch.ones(2, WIDTH), caches)


@pytest.mark.parametrize(("shape", "dtype"), [((2,), "float32"), ((), "float64"), ((), "int8")])
def test_another_field_with_the_scales_name_is_left_alone(shape, dtype):
    """An int8 field without scales is one of integers."""
    own = negcache_torch.FieldSpec(shape, dtype)
    manager = negcache_torch.CacheManager(specs_of(negcache_torch, e_scale=own), SLOTS)
    rows = {
        "x": torch.ones(2, WIDTH),
        "e": torch.full((2, WIDTH), 3, dtype=torch.int8),
        "e_scale": torch.ones((2, *shape), dtype=getattr(torch, dtype)),
    }
    cache = manager.update_cache(manager.init_cache(), new_items=rows)
    assert torch.equal(cache.data["e"][:2], rows["e"])
    with pytest.raises(negcache_torch.DTypeError, match="has dtype float32, but its field stores"):
        manager.update_cache(cache, new_items={**rows, "e": torch.ones(2, WIDTH)})


@ALL
def test_a_field_in_the_scales_place_is_refused_in_words(name):
    module = BACKENDS[name].module
    for spec in (module.FieldSpec((2,), "float32"), module.FieldSpec((), "int32")):
        manager = module.CacheManager(specs_of(module, e_scale=spec), SLOTS)
        with pytest.raises(module.DTypeError, match="give your field another name"):
            module.CacheLossHandler(manager, module.CacheClassificationLoss("e", ("x",)))


@ALL
def test_the_front_door_keeps_clear_of_the_users_fields(name):
    module = BACKENDS[name].module
    loss_fn = module.NegativeCacheLoss(
        SLOTS,
        {"x": module.FieldSpec((WIDTH,), "float32")},
        module.FieldSpec((WIDTH,), "int8"),
        labels={"embedding_scale": module.FieldSpec((), "float32")},
    )
    assert loss_fn.embedding_key == "item_embedding"
    assert set(loss_fn.cache_manager.specs) == {
        "x",
        "embedding_scale",
        "item_embedding",
        "item_embedding_scale",
    }


@ALL
@pytest.mark.parametrize("named", ["e", "e_scale"])
def test_a_loss_that_reads_codes_or_scales_is_refused_in_words(name, named):
    """The network would get embeddings in a step, and codes in a refresh."""
    backend = BACKENDS[name]
    module = backend.module
    manager = module.CacheManager(scaled(module), SLOTS)
    loss = module.CacheClassificationLoss("e", ("x", named))
    with pytest.raises(module.KeysError, match=f"names \\['{named}'\\], but 'e' has the codes"):
        module.CacheLossHandler(manager, loss)
    query, noise = rows_of(backend, 2)["x"], backend.to_native(np.zeros((2, 1, 2)))
    with pytest.raises(module.KeysError, match=f"names \\['{named}'\\], but 'e' has the codes"):
        loss.retrieve(query, manager.init_cache(), noise=noise)


def test_scales_are_no_frequencies():
    manager = negcache_torch.CacheManager(scaled(negcache_torch), SLOTS)
    loss = negcache_torch.CacheClassificationLoss("e", ("x",), log_frequency_key="e_scale")
    with pytest.raises(negcache_torch.KeysError, match="log_frequency_key names \\['e_scale'\\]"):
        negcache_torch.CacheLossHandler(manager, loss)


@ALL
def test_codes_do_not_tell_items_apart(name):
    module = BACKENDS[name].module
    with pytest.raises(module.DTypeError, match="unique_key 'e' has the codes of quantized rows"):
        module.CacheManager(scaled(module), SLOTS, unique_key="e")
    manager = module.CacheManager(specs_of(module), SLOTS, unique_key="e")
    with pytest.raises(module.DTypeError, match="unique_key 'e' has the codes of quantized rows"):
        module.CacheLossHandler(manager, module.CacheClassificationLoss("e", ("x",)))


def test_one_number_has_no_scale():
    specs = {
        "id": negcache_torch.FieldSpec((), "int8"),
        "id_scale": negcache_torch.FieldSpec((), "float32"),
    }
    manager = negcache_torch.CacheManager(specs, SLOTS, unique_key="id")
    rows = {"id": torch.ones(2, dtype=torch.int8), "id_scale": torch.ones(2)}
    cache = manager.update_cache(manager.init_cache(), new_items=rows)
    assert (cache.age == 0).sum() == 1


@ALL
@pytest.mark.parametrize("swapped", [False, True])
def test_caches_of_codes_and_of_floats_are_not_used_as_one(name, swapped):
    module = BACKENDS[name].module
    specs = [specs_of(module), specs_of(module, e=module.FieldSpec((WIDTH,), "float32"))]
    managers = {
        key: module.CacheManager(each, SLOTS)
        for key, each in zip("ab", specs[::-1] if swapped else specs, strict=True)
    }
    with pytest.raises(module.ShapeError, match=r"field 'e' of cache 'a' is .* need equal fields"):
        module.MultiCacheLossHandler(managers, module.CacheClassificationLoss("e", ("x",)))


def test_a_feature_may_have_scales_that_the_network_does_not_take():
    """It is int8 and has a label named after it: that is no embedding."""
    specs = {
        "x": negcache_torch.FieldSpec((WIDTH,), "int8"),
        "x_scale": negcache_torch.FieldSpec((), "float32"),
        "e": negcache_torch.FieldSpec((WIDTH,), "float32"),
    }
    loss = negcache_torch.CacheClassificationLoss("e", ("x",), generator=0)
    handler = negcache_torch.CacheLossHandler(negcache_torch.CacheManager(specs, SLOTS), loss)
    x = torch.arange(3 * WIDTH, dtype=torch.int8).reshape(3, WIDTH)
    features, embeddings = {"x": x, "x_scale": torch.ones(3)}, x.float()
    handler(lambda rows: rows["x"].float(), embeddings, embeddings, features)
    handler.evaluate(None, embeddings, embeddings, features)
    assert handler.retrieve(embeddings, features).features["x"].dtype == torch.int8
    with pytest.raises(negcache_torch.DTypeError, match=r"'x'\] has dtype float32, but its field"):
        loss.retrieve(embeddings, handler.cache, pos_features={"x": embeddings})


@pytest.mark.parametrize("dtype", ["uint8", "int16", "bool"])
def test_other_integers_are_no_embeddings(dtype):
    spec = negcache_torch.FieldSpec((WIDTH,), dtype)
    with pytest.raises(negcache_torch.DTypeError, match="expected floating item embeddings, or"):
        negcache_torch.NegativeCacheLoss(SLOTS, {"x": torch.ones(1, 2)}, spec)


def test_a_module_keeps_its_codes_whatever_is_done_to_it():
    handler = handler_of()
    step(handler)
    before = {key: rows.clone() for key, rows in handler.cache.data.items()}
    moved = copy.deepcopy(handler).half().to(torch.float64).bfloat16()
    other = handler_of()
    other.load_state_dict(moved.state_dict())
    for key, rows in before.items():
        assert moved.cache.data[key].dtype == rows.dtype
        assert torch.equal(other.cache.data[key], rows)
    losses = [step(each, 1) for each in (handler, other)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("scale", [torch.inf, torch.nan, 3e38])
def test_rows_that_are_not_finite_never_enter_or_are_evicted_on_load(scale):
    handler = handler_of()
    x = torch.ones(3, WIDTH)
    x[1] = torch.nan
    handler(lambda features: features["x"], torch.ones(3, WIDTH), x, {"x": torch.ones(3, WIDTH)})
    assert handler.metrics["nonfinite_count"] == 1
    assert int((handler.cache.age != EMPTY).sum()) == 2
    state = copy.deepcopy(handler.state_dict())
    scales = next(key for key in state if "scale" in key)
    slot = int(torch.nonzero(handler.cache.age != EMPTY)[0, 0])
    state[scales][slot] = scale
    other = handler_of()
    with pytest.warns(negcache_torch.NonFiniteWarning, match="1 rows"):
        other.load_state_dict(state)
    assert int((other.cache.age != EMPTY).sum()) == 1
    assert not nonfinite_rows(other.cache, "e", handler.backend).any()


def test_int8_rows_are_no_half_rows(tmp_path):
    handler = handler_of()
    handler.save(tmp_path / "rows")
    half = negcache_torch.FieldSpec((WIDTH,), "float16")
    other = negcache_torch.CacheLossHandler(
        negcache_torch.CacheManager(specs_of(negcache_torch, e=half), SLOTS),
        negcache_torch.CacheClassificationLoss("e", ("x",), generator=0),
    )
    with pytest.raises(
        negcache_torch.DTypeError, match=r"expected float16\. Make the handler with"
    ):
        other.load(tmp_path / "rows")


def test_rows_beyond_a_half_are_stored():
    """70,000 is infinite in float16, but codes have scales."""
    handler = handler_of()
    x = torch.full((2, WIDTH), 7e4)
    handler(lambda features: features["x"], torch.zeros(2, WIDTH), x, {"x": x})
    assert handler.metrics["nonfinite_count"] == 0
    assert int((handler.cache.age != EMPTY).sum()) == 2
    assert torch.isfinite(handler.cache.data["e_scale"]).all()


def test_a_resized_cache_keeps_codes_with_their_scales():
    handler = handler_of()
    step(handler, rows=5)
    values = dequantize(handler.cache.data["e"], handler.cache.data["e_scale"], xp=torch_xp())
    handler.resize(20)
    found = dequantize(handler.cache.data["e"], handler.cache.data["e_scale"], xp=torch_xp())
    assert torch.equal(found[:SLOTS], values)
    assert not found[SLOTS:].any()


def torch_xp():
    return BACKENDS["torch"].module.CacheManager.backend.xp


def test_a_cache_says_its_size_with_scales():
    assert "e int8 (6,)" in repr(handler_of())
    assert f"{SLOTS * (24 + 6 + 4)} bytes" in repr(handler_of())
