"""Where new rows go in shards, with many rows: found by sorting, and not pair by pair."""

from negcache_core.cache import matching
from negcache_core.testing import CHECKS, NUMPY_ADAPTER


def test_many_rows_come_home_as_few_do(monkeypatch):
    monkeypatch.setattr(matching, "FEW", 0)
    CHECKS["shards"](NUMPY_ADAPTER)
