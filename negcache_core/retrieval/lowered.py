"""Queries in the dtype of stored rows, for devices that multiply these faster than float32."""

from typing import Any, NamedTuple, Self

from negcache_core.arrays._array import Array, cast, dtype_name
from negcache_core.cache.quantized import dequantize, quantize


class Lowered(NamedTuple):
    """Queries as small numbers of the rows' dtype, float16, bfloat16 or int8, and their scales.

    queries: (B, D); scale: (B,) float32, which multiplies them

    The scale keeps float16 from overflowing.
    """

    queries: Array
    scale: Array

    @classmethod
    def of(cls, queries: Array, table: Array, xp: Any) -> Self:
        """Round float32 queries (B, D) to the dtype of `table`."""
        if dtype_name(table.dtype) == "int8":
            return cls(*quantize(queries, xp=xp))
        top = xp.max(xp.abs(queries), axis=-1)
        scale = xp.where((top > 0.0) & xp.isfinite(top), top, 1.0)
        return cls(cast(queries / scale[:, None], table.dtype, xp), scale)

    def raised(self, xp: Any) -> Array:
        """Return the rounded queries in float32."""
        found: Array = dequantize(self.queries, self.scale, xp=xp)
        return found

    def of_queries(self, rows: Array, xp: Any) -> Self:
        """Return some of the queries, by their rows (n,)."""
        return type(self)(xp.take_rows(self.queries, rows), xp.take_rows(self.scale, rows))
