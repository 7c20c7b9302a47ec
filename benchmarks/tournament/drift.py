"""How items' embeddings have moved since they were cached: a map that is learned for free."""

import math
from typing import Any

import torch
from torch import Tensor

from .towers import WIDTH

RIDGE = 1.0
MEMORY = 2_048  # about how many pairs count fully; older ones fade


class DriftMap:
    """A linear map from a stale embedding to its drift, by ridge regression on all drawn rows.

    A step re-embeds its drawn rows, so for these both are known: d = fresh - stale is regressed
    on x = [stale, 1]. M = (A + ridge I)^-1 R, where A sums x x^T and R sums x d^T, both fading. A
    corrected row is e + M_e^T e + b, and its score with a query q is (q + M_e q) . e + q . b: so
    the queries are corrected, and the table is left alone.
    """

    def __init__(self, ridge: float = RIDGE) -> None:
        self.ridge = ridge
        self.squares, self.products = (
            torch.zeros(WIDTH + 1, WIDTH + 1),
            torch.zeros(WIDTH + 1, WIDTH),
        )
        self.map = torch.zeros(WIDTH + 1, WIDTH)

    def of_queries(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries (B, D) to score the table with, and an offset for their scores, (B,)."""
        return queries + queries @ self.map[:-1].T, queries @ self.map[-1]

    def of_rows(self, rows: Tensor) -> Tensor:
        """Return corrected rows (n, D)."""
        return rows + rows @ self.map[:-1] + self.map[-1]

    def of_retrieval(self, retrieval: Any, gain: Tensor) -> Any:
        """Return a retrieval by corrected queries as one from a cache of corrected rows.

        gain: (B,) the offset of all cached scores of a query. Draws do not depend on it; the
              cache's part of the partition function does.
        """
        pool, readout = retrieval.pool, retrieval.readout
        if pool is not None:
            pool = pool._replace(
                stale=self.of_rows(pool.stale), cross_scores=pool.cross_scores + gain[:, None]
            )
        return retrieval._replace(
            log_partition=retrieval.log_partition + gain,
            stale_embeddings=self.of_rows(retrieval.stale_embeddings),
            pool=pool,
            readout=None if readout is None else self.of_rows(readout),
        )

    def learn(self, stale: Tensor, fresh: Tensor) -> dict[str, float]:
        """Take in drawn rows (n, D); return their |fresh - stale|^2 without and with the map.

        This uses the map before it has learned from these rows.
        """
        if not len(stale):
            return {}
        moved = fresh - stale
        left = fresh - self.of_rows(stale)
        figures = {
            "drift": moved.square().sum(1).mean().item(),
            "drift_residual": left.square().sum(1).mean().item(),
        }
        known = torch.cat([stale, torch.ones(len(stale), 1)], 1)
        kept = math.exp(-len(stale) / MEMORY)
        self.squares = kept * self.squares + known.T @ known
        self.products = kept * self.products + known.T @ moved
        penalty = self.ridge * torch.eye(WIDTH + 1)
        self.map = torch.linalg.solve(self.squares + penalty, self.products)
        return figures
