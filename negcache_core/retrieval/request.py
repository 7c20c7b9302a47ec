"""What a loss asks retrieval for: its options, and the checked arguments of one call."""

from collections.abc import Callable
from typing import Any, NamedTuple

from negcache_core.arrays._array import Array
from negcache_core.arrays.backend import Backend
from negcache_core.arrays.exclusion import Exclusions
from negcache_core.cache.named import Caches
from negcache_core.retrieval.positives import Positives
from negcache_core.retrieval.prefixes import Prefixes
from negcache_core.retrieval.scorer import Scorer
from negcache_core.retrieval.tiled_scores import CacheScores, scores_of


class Wanted(NamedTuple):
    """What a loss wants from retrieval; see CacheClassificationLoss for each option's meaning.

    shares_draws: whether every query needs to know what the others drew
    reads_out:    whether to return the mean embedding under a query's softmax
    prefixes:     the widths at which embeddings are compared, None for the full width
    fused:        whether one kernel scores the cache
    """

    embedding_key: str
    data_keys: tuple[str, ...]
    id_keys: tuple[str, ...] = ()
    group_key: str | None = None
    bias_key: str | None = None
    num_samples: int = 1
    top_k: int | None = None
    retrieval_fn: Callable[[Array], Array] | None = None
    in_batch: bool = False
    shares_draws: bool = False
    reads_out: bool = False
    tile_bytes: int | None = None
    prefixes: Prefixes | None = None
    fused: bool = False

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of the cache that retrieval reads, the embedding's first."""
        told = filter(None, (*self.id_keys, self.group_key, self.bias_key))
        return (self.embedding_key, *self.data_keys, *told)


class Request(NamedTuple):
    """Checked arguments of `retrieve`: queries (B, D) are constants, noise (B, S, 2) or None."""

    wanted: Wanted
    queries: Array
    caches: Caches
    batch: Positives
    stand_in: dict[str, Array] | None
    noise: Array | None
    generator: Any
    scorer: Scorer
    backend: Backend

    def scores(self, queries: Array, own: Exclusions | None, first: Any = 0) -> list[CacheScores]:
        """Return the scores of queries (n, D) against each cache, computed on demand.

        own:   what must not be a negative of each query
        first: the number of the first slot of all
        """
        wanted = self.wanted
        return scores_of(
            queries,
            self.caches,
            wanted.embedding_key,
            self.scorer,
            self.backend,
            wanted.tile_bytes,
            own=own,
            id_keys=wanted.id_keys,
            group_key=wanted.group_key,
            bias_key=wanted.bias_key,
            window=self.caches.window,
            first=first,
            fused=wanted.fused,
        )
