"""The door to array libraries: the array API, what it lacks, and the checks of arguments.

Nothing here knows of caches. `Backend` is what an adapter overrides; `NUMPY` is the reference.
"""

from negcache_core.arrays.backend import NUMPY, Backend

__all__ = ["NUMPY", "Backend"]
