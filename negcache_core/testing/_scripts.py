"""What the scripts of the checks are made of: the same inputs, and comparing what comes out."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from negcache_core.cache.state import EMPTY, NegativeCache
from negcache_core.testing._adapter import NUMPY_ADAPTER, Adapter, Tree

WIDTH, TOKENS = 4, 3
SLOTS, DRAWS = 6, 8  # slots of the handlers: few sizes, for libraries that compile for each shape
SPECS = {"tokens": ((TOKENS,), "int64"), "id": ((), "int32"), "embedding": ((WIDTH,), "float64")}
TABLE = np.linspace(-1.0, 1.0, 11 * WIDTH).reshape(11, WIDTH)  # the towers' token embeddings


def manager_of(
    module: Any, capacity: int, use_lru: bool = True, *, stored: str = "float64", **options: Any
) -> Any:
    """Return a manager of SPECS. stored: the dtype of embeddings; int8 comes with scales."""
    specs = {key: module.FieldSpec(shape, dtype) for key, (shape, dtype) in SPECS.items()}
    specs["embedding"] = module.FieldSpec((WIDTH,), stored)
    return module.CacheManager(specs, capacity, use_lru, **options).storing("embedding")


def handler_of(
    side: Adapter, seed: int = 0, *, new_items_filter: Any = None, **options: Any
) -> Any:
    """Return a handler that holds an empty cache of SLOTS slots; options are the loss's."""
    module = side.module
    if side.hold is None:
        options["generator"] = seed
    handler = module.CacheLossHandler(
        manager_of(module, SLOTS),
        module.CacheClassificationLoss("embedding", ("tokens",), num_samples=DRAWS, **options),
        embedding_key="embedding",
        data_keys=("tokens",),
        new_items_filter=new_items_filter,
    )
    return handler if side.hold is None else side.hold(handler, seed)


def items_of(rng: Any, rows: int) -> dict[str, Any]:
    """Return random rows of SPECS."""
    return {
        "tokens": rng.integers(0, 11, (rows, TOKENS)),
        "id": rng.integers(0, 5, rows).astype(np.int32),
        "embedding": rng.standard_normal((rows, WIDTH)),
    }


def cache_of(rng: Any, capacity: int) -> NegativeCache:
    """Return a cache with some empty slots, zero-filled as the manager leaves them."""
    age = rng.integers(0, 4, capacity).astype(np.int32)
    age[rng.random(capacity) < 0.3] = EMPTY
    return zero_filled(items_of(rng, capacity), age)


def half_full(seed: int) -> NegativeCache:
    """Return a cache of SLOTS slots for a handler to restore: four written, of different ages."""
    age = np.asarray([2, EMPTY, 0, 3, EMPTY, 2], np.int32)
    return zero_filled(items_of(np.random.default_rng(seed), SLOTS), age)


def zero_filled(rows: dict[str, Any], age: Any) -> NegativeCache:
    """Return a cache whose slots that were never written are zero."""
    written = age != EMPTY
    data = {
        key: value * written.reshape((-1,) + (1,) * (value.ndim - 1)).astype(value.dtype)
        for key, value in rows.items()
    }
    return NegativeCache(data, age)


def embed(side: Adapter, features: dict[str, Any]) -> Any:
    """Return the same function of token ids on every library: the mean of their rows of TABLE."""
    xp = side.module.CacheManager.backend.xp
    rows = xp.take_rows(side.to_native(TABLE), xp.reshape(features["tokens"], (-1,)))
    return xp.mean(xp.reshape(rows, (-1, TOKENS, WIDTH)), axis=1)


def act(
    side: Adapter, handler: Any, action: Callable[[Any, Tree], Tree], cache: Any, batch: Tree
) -> tuple[Tree, NegativeCache]:
    """Return, as NumPy, action(handler, batch), perhaps traced, and the cache after it.

    cache: what the handler starts from, where its state is explicit
    """
    if side.bind is None:
        result = side.replay(lambda _, batch: action(handler, batch), {}, batch)
        return result, side.numpy(handler.cache)
    bind = side.bind

    def script(cache: Any, batch: Any) -> Any:
        bound = bind(handler, cache)
        return action(bound, batch), bound.cache

    result, after = side.replay(script, cache, batch)
    return result, after


def compare(adapter: Adapter, script: Callable[..., Any], state: Any, batch: Any) -> None:
    """Replay `script(adapter, state, batch)` on both sides and compare all it returns."""

    def bound(side: Adapter) -> Any:
        return side.replay(lambda state, batch: script(side, state, batch), state, batch)

    assert_equal(adapter.name, "", bound(adapter), bound(NUMPY_ADAPTER))


def assert_equal(
    name: str, path: str, given: Any, expected: Any, *, tolerance: float = 1e-12
) -> None:
    """Raise AssertionError unless two trees are equal; with tolerance 0, bit for bit."""
    if isinstance(expected, (dict, tuple)):
        pairs = expected.items() if isinstance(expected, dict) else enumerate(expected)
        for key, value in pairs:
            assert_equal(name, f"{path}/{key}", given[key], value, tolerance=tolerance)
    elif expected is not None:
        message = f"{name} differs from what is expected at {path}"
        if tolerance == 0:
            np.testing.assert_array_equal(given, expected, err_msg=message, strict=True)
            return
        np.testing.assert_allclose(
            given, expected, rtol=tolerance, atol=tolerance, err_msg=message, strict=True
        )


def assert_true(condition: Any, message: str) -> None:
    """Raise AssertionError unless a condition holds, even if Python skips `assert`."""
    if not condition:
        raise AssertionError(message)


def assert_raises(
    name: str, errors: type[Exception] | tuple[type[Exception], ...], function: Callable[[], Any]
) -> Exception:
    """Return the error that a call raises; AssertionError if it raises none of `errors`."""
    try:
        function()
    except errors as error:
        return error
    raise AssertionError(f"{name} was expected to raise {errors}, and raised nothing.")


def both(
    adapter: Adapter, script: Callable[[Adapter], Iterable[Tree]], *, tolerance: float = 1e-12
) -> None:
    """Compare what `script(side)` yields, step after step, on the adapter and on NumPy."""
    steps = zip(script(adapter), script(NUMPY_ADAPTER), strict=True)
    for step, (given, expected) in enumerate(steps):
        assert_equal(adapter.name, f"step {step}", given, expected, tolerance=tolerance)
