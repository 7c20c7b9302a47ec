"""The interface to array libraries: the array API, what it lacks, and argument checks.

Nothing here knows about caches. `Backend` is what an adapter overrides; `NUMPY` is the reference.
"""

from negcache_core.arrays.backend import NUMPY, Backend

__all__ = ["NUMPY", "Backend"]
