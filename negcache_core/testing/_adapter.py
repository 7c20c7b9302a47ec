"""What the kit must know of an adapter."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

import negcache_core
from negcache_core import adapter
from negcache_core.arrays.backend import Backend

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
    """An adapter under test.

    name:      for messages
    module:    has negcache's public names, bound to the library
    to_native: NumPy array -> the library's array, of the same dtype
    to_numpy:  the reverse
    run:       (function, state, batch) -> function(state, batch), perhaps traced or compiled;
               sizes of `state` are fixed, the first sizes of `batch` may be made unknown
    bind:      (handler, cache) -> the handler holding that cache, where state is explicit; or None
    gradients: (function, arrays) -> gradients of the scalar function(*arrays), if any
    dtypes:    names of the dtypes that fields can have
    """

    name: str
    module: Any
    to_native: Callable[[Any], Any]
    to_numpy: Callable[[Any], Any]
    run: Callable[..., Tree] = _call
    bind: Callable[[Any, Any], Any] | None = None
    gradients: Callable[..., list[Any]] | None = None
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


def bind(backend: Backend) -> SimpleNamespace:
    """Return negcache's public names bound to `backend`, for a library without an adapter."""
    public = {name: getattr(negcache_core, name) for name in negcache_core.__all__}
    return SimpleNamespace(**{**public, **adapter.bind(backend, __name__)._asdict()})


NUMPY_ADAPTER = Adapter("numpy", negcache_core, np.asarray, np.asarray)
