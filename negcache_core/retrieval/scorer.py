"""How a query scores an item."""

from collections.abc import Callable
from typing import Any, NamedTuple

from negcache_core.arrays._array import Array, cast
from negcache_core.retrieval import prefixes as matryoshka


class Scorer(NamedTuple):
    """score(q, d) = transform(scale * <q, d>), computed in `dtype`.

    scale:     None, a number, or a function returning one or an array of one value, perhaps trained
    transform: None, or an elementwise function of scores, which may hold trained values; it
               returns the same shape and dtype
    dtype:     the dtype to compute in; half types are converted to float32 before the product
    prefixes:  None, or the widths at which scores are scale * cosine of the first coordinates,
               without a transform. A query then has W scores with an item: B queries (B, D) become
               B * W, by query and width. Scaled queries are (B, D + W), and all methods accept
               them as queries.
    """

    scale: Any
    transform: Callable[[Array], Array] | None
    dtype: Any
    xp: Any
    prefixes: matryoshka.Prefixes | None = None

    def pairs(self, queries: Array, items: Array) -> Array:
        """Score each query (B, D) with its own items (B, D) or (B, S, D): (B,) or (B, S)."""
        if self.prefixes is not None:
            items = cast(items, self.dtype, self.xp)
            return matryoshka.pairs(self._wide(queries, items), items, self.prefixes, self.xp)
        queries = cast(queries, self.dtype, self.xp)
        if len(items.shape) == 3:
            queries = queries[:, None, :]
        products = self.xp.sum(queries * cast(items, self.dtype, self.xp), axis=-1)
        return self._transformed(products if self.scale is None else products * self._scale())

    def by_row(self, scaled_queries: Array, items: Array) -> Array:
        """Score each query (B, D), with the scale in it, with its own items (B, n, D): (B, n).

        Items are in the dtype to compute in.
        """
        return self._transformed(self.xp.matmul(items, scaled_queries[:, :, None])[:, :, 0])

    def by_item(self, scaled_queries: Array, items: Array) -> Array:
        """Score items (C, D) with queries (B, D) that have the scale in them: (C, B)."""
        products = self.xp.matmul_transposed(cast(items, self.dtype, self.xp), scaled_queries)
        return products if self.transform is None else self.of_products(products)

    def of_products(self, scores: Array) -> Array:
        """Return the scores (C, B) of products with scaled queries."""
        if self.transform is None:
            return scores
        # The user's function sees (B, C), however it is computed.
        return self.xp.matrix_transpose(self._transformed(self.xp.matrix_transpose(scores)))

    def cross(self, queries: Array, items: Array) -> Array:
        """Score every query (B, D) with every item (n, D): (B, n)."""
        if self.prefixes is not None:
            items = cast(items, self.dtype, self.xp)
            return matryoshka.cross(self._wide(queries, items), items, self.prefixes, self.xp)
        return self.xp.matrix_transpose(self.by_item(self.scaled(queries), items))

    def scaled(self, queries: Array) -> Array:
        """Return queries (B, D) times the scale."""
        queries = cast(queries, self.dtype, self.xp)
        if self.prefixes is not None:
            scale = None if self.scale is None else self._scale()
            return matryoshka.with_factors(queries, scale, self.prefixes, self.xp)
        return queries if self.scale is None else queries * self._scale()

    def _wide(self, queries: Array, items: Array) -> Array:
        """Return scaled queries (B, D + W) from queries that may already be scaled."""
        return self.scaled(queries) if queries.shape[1] == items.shape[-1] else queries

    def _transformed(self, scores: Array) -> Array:
        if self.transform is None:
            return scores
        return self.transform(scores)

    def _scale(self) -> Any:
        scale = self.scale() if callable(self.scale) else self.scale
        if isinstance(scale, (int, float)):
            return scale
        return cast(self.xp.reshape(scale, ()), self.dtype, self.xp)
