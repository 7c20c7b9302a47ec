"""Keras on JAX: a handler's state is in Keras variables, which the trainer passes through jit."""

from typing import Any

import jax
import keras
from jax import Array
from negcache_jax._backend import JAX, KeyStream, check_key
from negcache_jax._handler import Silent
from negcache_jax._loss import KeyedLoss

from negcache_core import KindError, NegativeCache, OptionError
from negcache_core.adapter import Caches, Setup, Store, bind
from negcache_core.handlers import CacheLossHandler
from negcache_core.retrieval.placement import HERE

from ._host import Host


class VariableKeys(KeyStream):
    """Keys for draws, split from one stored as raw data: Keras variables hold no typed keys."""

    def __init__(self, key: Array) -> None:
        self._kind = jax.random.key_impl(key)
        self.variable = _variable("key", jax.random.key_data(key))

    @property
    def key(self) -> Array:
        """The key from which the next ones are split."""
        return jax.random.wrap_key_data(self.variable.value, impl=self._kind)

    @key.setter
    def key(self, key: Array) -> None:
        self.variable.assign(jax.random.key_data(key))


class VariableStore(Store):
    """A handler's caches in Keras variables, which a stateless scope passes through a function."""

    def __init__(self, setup: Setup) -> None:
        self._distribution = keras.distribution.distribution()
        self.replace(setup.init_caches(HERE))

    def replace(self, caches: Caches) -> None:
        """Create variables that hold `caches`."""
        self._tables = {
            name: NegativeCache(
                {key: _variable(key, rows) for key, rows in cache.data.items()},
                _variable("age", cache.age),
            )
            for name, cache in caches.items()
        }
        window = caches.window
        self._window = None if window is None else _variable("window", window)

    def read(self) -> Caches:
        """Return the values of the variables."""
        if keras.distribution.distribution() is not self._distribution:
            raise OptionError(
                f"the cache was made under the distribution {self._distribution}, and "
                f"{keras.distribution.distribution()} is set now: set it before the model is made."
            )
        caches = {
            name: NegativeCache({key: _value(rows) for key, rows in data.items()}, _value(age))
            for name, (data, age) in self._tables.items()
        }
        return Caches(caches, None if self._window is None else _value(self._window))

    def write(self, caches: Caches) -> None:
        """Assign to the variables."""
        for name, (data, age) in self._tables.items():
            for key, rows in data.items():
                rows.assign(caches[name].data[key])
            age.assign(caches[name].age)
        if self._window is not None:
            self._window.assign(caches.window)

    def generators(self, loss: Any) -> list[Any]:
        """Return the one stream from which all draws come."""
        return [loss.generator]

    @property
    def variables(self) -> list[Any]:
        """All variables, in a fixed order."""
        found = [each for data, age in self._tables.values() for each in (*data.values(), age)]
        return found if self._window is None else [*found, self._window]


def _variable(name: str, value: Array) -> Any:
    return keras.Variable(
        value,
        dtype=value.dtype.name,
        trainable=False,
        autocast=False,  # rows keep their dtype under any policy
        name=f"negative_cache_{name}".replace("/", "_"),
    )


def _value(variable: Any) -> Array:
    try:
        return variable.value
    except TypeError as error:  # Keras calls an initializer that it has dropped
        raise OptionError(
            "the cache is in the middle of a fit, which keeps the values of all variables to "
            "itself: a callback's self.model restores them, so reach the layer through it. After "
            "a fit that raised they may be lost: make the model again, and load its file."
        ) from error


class _FrontDoor:
    """Cross-entropy of each query's item against everything in a cache, in Keras variables.

    generator: an int seed, or a key of jax.random, for all draws; None seeds them from
               `keras.utils.set_random_seed`

    It holds its own state: no call takes or returns one. For the other arguments see
    `negcache_core.NegativeCacheLoss`.
    """

    cache_loss: Any

    def __init__(
        self, *arguments: Any, generator: Any = None, group: Any = None, **options: Any
    ) -> None:
        if group is not None:
            raise OptionError(
                "group cuts a cache into shards, whose state Keras's files cannot hold: set a "
                "keras.distribution, under which every device has the whole cache, or write the "
                "training loop as docs/scaling.md shows."
            )
        keys = _keys(generator)
        super().__init__(*arguments, **options)
        self.cache_loss = self.cache_loss.with_keys(keys)


def _keys(seed: Any) -> VariableKeys:
    if seed is None:
        seed = int(keras.random.SeedGenerator().state.numpy()[0])
    if isinstance(seed, int) and not isinstance(seed, bool):
        return VariableKeys(jax.random.key(seed))
    if isinstance(seed, Array):
        return VariableKeys(check_key(seed, "generator"))
    raise KindError(f"generator is {seed!r}: expected None, an int seed, or a key of jax.random.")


_BOUND = bind(
    JAX,
    "negcache_keras",
    store=VariableStore,
    mixins={
        "CacheClassificationLoss": KeyedLoss,
        "CacheLossHandler": Silent,
        "NegativeCacheLoss": _FrontDoor,
    },
)
NegativeCacheLoss = _BOUND.NegativeCacheLoss


class JaxHost(Host):
    """JAX, with or without jit, on one or more devices of one process."""

    package = "negcache_jax"

    def adopt(self, handler: CacheLossHandler) -> CacheLossHandler:
        """Return a handler with its state in Keras variables, for one of `negcache_jax`."""
        if isinstance(handler, _BOUND.CacheLossHandler):
            return handler
        setup: Setup = handler._setup  # noqa: SLF001 - of the same project
        loss = handler.cache_loss.with_keys(_keys(None))
        return _BOUND.CacheLossHandler.over(handler, loss, VariableStore(setup))

    def variables(self, handler: CacheLossHandler) -> list[Any]:
        """Return the variables that hold rows, ages, the window and the key."""
        store: Any = handler._store  # noqa: SLF001 - of the same project
        return [*store.variables, handler.cache_loss.generator.variable]

    def check_placement(self) -> None:
        """Refuse several processes; a distribution over the devices of one process is fine."""
        if jax.process_count() > 1:
            raise OptionError(
                f"{jax.process_count()} processes train, and Keras's files hold the cache of one: "
                "write the training loop as docs/scaling.md shows."
            )


HOST = JaxHost()
