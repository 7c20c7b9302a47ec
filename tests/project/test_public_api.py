"""Public names: the same in every package, and importable as in the published code."""

import importlib
import inspect

import negcache_jax
import negcache_tensorflow
import negcache_torch
import pytest

import negcache_core

ADAPTERS = (negcache_torch, negcache_tensorflow, negcache_jax)
PACKAGES = (negcache_core, *ADAPTERS)
NAMES = {
    "EMPTY",
    "FieldSpec",
    "NegativeCache",
    "CacheManager",
    "CacheClassificationLoss",
    "CacheLossReturn",
    "CacheLossHandler",
    "MultiCacheLossHandler",
    "GumbelMaxRetrievalFn",
    "MaxScoreRetrievalFn",
    "IsInCacheFilterFn",
    "approximate_top_k_with_indices",
    "in_chunks",
}
MODULES = {
    "negative_cache": {"NegativeCache", "CacheManager"},
    "losses": {"CacheLossReturn", "CacheLoss", "CacheClassificationLoss"},
    "handlers": {"CacheLossHandler", "MultiCacheLossHandler"},
    "filter_fns": {"CacheFilterFn", "IsInCacheFilterFn"},
    "retrieval_fns": {"AbstractRetrievalFn", "MaxScoreRetrievalFn", "GumbelMaxRetrievalFn"},
}
SIGNATURES = {
    "CacheManager": ["specs", "cache_size", "use_lru"],
    "CacheClassificationLoss": [
        "embedding_key",
        "data_keys",
        "score_transform",
        "top_k",
        "reducer",
    ],
    "CacheLossHandler": [
        "cache_manager",
        "cache_loss",
        "embedding_key",
        "data_keys",
        "use_cross_replica",
    ],
    "GumbelMaxRetrievalFn": ["inv_temp"],
    "in_chunks": ["network", "size"],
    "IsInCacheFilterFn": ["keys"],
    "FieldSpec": ["shape", "dtype"],
    "NegativeCache": ["data", "age"],
}


def package_name(package):
    return package.__name__


@pytest.mark.parametrize("package", PACKAGES, ids=package_name)
def test_names(package):
    assert set(package.__all__) >= NAMES
    assert all(hasattr(package, name) for name in package.__all__)
    shared = {name for name in package.__all__ if name not in MODULES} - {
        "__version__",
        "HandlerState",
        "DistributedCacheClassificationLoss",
    }
    assert shared == set(negcache_core.__all__)


@pytest.mark.parametrize("package", ADAPTERS, ids=package_name)
def test_a_cache_in_shards_has_its_loss(package):
    loss = package.DistributedCacheClassificationLoss
    assert loss is package.losses.DistributedCacheClassificationLoss
    assert "DistributedCacheClassificationLoss" in package.__all__


@pytest.mark.parametrize("package", ADAPTERS, ids=package_name)
@pytest.mark.parametrize("module", MODULES)
def test_published_modules(package, module):
    imported = importlib.import_module(f"{package.__name__}.{module}")
    for name in MODULES[module]:
        assert hasattr(imported, name)
        assert getattr(imported, name) is getattr(package, name)


@pytest.mark.parametrize("package", PACKAGES, ids=package_name)
@pytest.mark.parametrize("name", SIGNATURES)
def test_published_positions_come_first_and_the_rest_is_keyword_only(package, name):
    parameters = inspect.signature(getattr(package, name)).parameters.values()
    positional = [p.name for p in parameters if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    assert positional == SIGNATURES[name]


def test_the_published_fields_come_first():
    assert negcache_core.CacheLossReturn._fields[:6] == (
        "training_loss",
        "interpretable_loss",
        "updated_item_data",
        "updated_item_indices",
        "updated_item_mask",
        "staleness",
    )
    assert negcache_core.EMPTY == 2**31 - 1


@pytest.mark.parametrize("package", PACKAGES, ids=package_name)
def test_every_public_name_is_documented(package):
    for name in package.__all__:
        value = getattr(package, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert (value.__doc__ or "").strip(), f"{package.__name__}.{name}"


def test_errors_are_of_the_builtin_kinds():
    errors = {
        name: getattr(negcache_core, name) for name in negcache_core.__all__ if "Error" in name
    }
    for name, error in errors.items():
        assert issubclass(error, negcache_core.NegcacheError)
        if error is not negcache_core.NegcacheError:
            kind = TypeError if name in ("DTypeError", "KindError") else ValueError
            assert issubclass(error, kind)
