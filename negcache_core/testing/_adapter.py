"""What the kit must know about an adapter."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

import negcache_core
from negcache_core import adapter
from negcache_core.arrays.backend import NUMPY, Backend
from negcache_core.testing._threads import ThreadReplicas, Threads

Tree = Any  # nested dicts, tuples and NamedTuples of arrays


def _call(function: Callable[[Tree, Tree], Tree], state: Tree, batch: Tree) -> Tree:
    return function(state, batch)


DTYPES = (
    "bool",
    *(f"int{bits}" for bits in (8, 16, 32, 64)),
    *(f"uint{bits}" for bits in (8, 16, 32, 64)),
    *(f"float{bits}" for bits in (16, 32, 64)),
)


class Adapter(NamedTuple):
    """An adapter under test. Most need only the first four fields.

    name:      for messages
    module:    has negcache's public names, bound to the library
    to_native: NumPy array -> the library's array, of the same dtype
    to_numpy:  the reverse
    run:       (function, state, batch) -> function(state, batch), perhaps traced or compiled;
               sizes of `state` are fixed, the first sizes of `batch` may be made unknown
    bind:      (handler, cache) -> the handler holding that cache, where state is explicit; or None
    hold:      (handler, seed) -> the handler holding an empty cache, its draws seeded, where state
               is explicit; or None: handlers hold their state, and losses take generator=seed
    gradients: (function, arrays, *constants) -> gradients by `arrays` of the scalar
               function(*arrays, *constants), if any; a library that traces should reuse the trace
               of a function that it gets again
    replicas:  (count, function) -> what function(adapter, rank) returned on each of `count`
               replicas, by rank, if caches can be split into shards. The function and its results
               can be pickled, for replicas in other processes, which then recreate the adapter
    dtypes:    names of the dtypes that fields can have
    """

    name: str
    module: Any
    to_native: Callable[[Any], Any]
    to_numpy: Callable[[Any], Any]
    run: Callable[..., Tree] = _call
    bind: Callable[[Any, Any], Any] | None = None
    hold: Callable[[Any, int], Any] | None = None
    gradients: Callable[..., list[Any]] | None = None
    replicas: Callable[[int, Callable[["Adapter", int], Tree]], list[Tree]] | None = None
    dtypes: tuple[str, ...] = DTYPES

    def native(self, tree: Tree) -> Tree:
        """Convert every NumPy array of a tree."""
        return map_tree(self.to_native, tree)

    def numpy(self, tree: Tree) -> Tree:
        """Copy every array of a tree to NumPy; live state may change later."""
        return map_tree(lambda leaf: np.array(self.to_numpy(leaf)), tree)

    def replay(self, function: Callable[[Tree, Tree], Tree], state: Tree, batch: Tree) -> Tree:
        """Run `function` on NumPy inputs and return its output as NumPy."""
        return self.numpy(self.run(function, self.native(state), self.native(batch)))


def map_tree(function: Callable[[Any], Any], tree: Tree) -> Tree:
    """Apply `function` to the leaves of dicts, tuples and NamedTuples; None stays None."""
    if tree is None:
        return None
    if isinstance(tree, dict):
        return {key: map_tree(function, value) for key, value in tree.items()}
    if isinstance(tree, tuple):
        values = [map_tree(function, value) for value in tree]
        return type(tree)(*values) if hasattr(tree, "_fields") else tuple(values)
    return function(tree)


def bind(backend: Backend, **parts: Any) -> SimpleNamespace:
    """Return negcache's public names bound to `backend`, for a library without an adapter.

    parts: module, store, replicas, mixins: see `negcache_core.adapter.bind`
    """
    public = {name: getattr(negcache_core, name) for name in negcache_core.__all__}
    bound = adapter.bind(backend, __name__, **parts)
    return SimpleNamespace(**{**public, **bound._asdict()})


def _on_threads(count: int, function: Callable[[Adapter, int], Tree]) -> list[Tree]:
    return Threads.run(count, lambda rank: function(NUMPY_ADAPTER, rank))


NUMPY_ADAPTER = Adapter(
    "numpy",
    bind(NUMPY, replicas=ThreadReplicas),
    np.asarray,
    np.asarray,
    replicas=_on_threads,
)
