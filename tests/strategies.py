"""Hypothesis strategies, shared and extended by every feature."""

from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st

from negcache_core import EMPTY

seeds = st.integers(0, 2**32 - 1)


class Towers(NamedTuple):
    """A small retrieval problem: linear towers over a cache, small enough to enumerate.

    query = y @ V, item = x @ W; the cache holds features `x` and, stale, `x @ W_then`.
    """

    y: Any  # (B, K)
    x_positive: Any  # (B, K)
    x: Any  # (C, K)
    V: Any  # (K, D)
    W: Any
    W_then: Any
    scale: Any
    age: Any

    @property
    def written(self):
        return self.age != EMPTY

    @property
    def cache_data(self):
        """Rows as a manager leaves them: zeros in empty slots."""
        rows = self.written[:, None]
        return {"x": self.x * rows, "embedding": (self.x @ self.W_then) * rows}


@st.composite
def towers(draw, *, stale, max_slots=4, max_queries=2, min_queries=1):
    rng = np.random.default_rng(draw(seeds))
    queries, slots = draw(st.integers(min_queries, max_queries)), draw(st.integers(1, max_slots))
    features, width = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    empty = draw(st.lists(st.booleans(), min_size=slots, max_size=slots))
    W = rng.standard_normal((features, width))
    return Towers(
        y=rng.standard_normal((queries, features)),
        x_positive=rng.standard_normal((queries, features)),
        x=rng.standard_normal((slots, features)),
        V=rng.standard_normal((features, width)),
        W=W,
        W_then=W + 0.3 * rng.standard_normal(W.shape) if stale else W,
        scale=np.asarray(draw(st.floats(0.1, 3.0))),
        age=np.where(empty, EMPTY, rng.integers(0, 9, slots)).astype(np.int32),
    )
