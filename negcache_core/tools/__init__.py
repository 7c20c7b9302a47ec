"""Tools around a step: networks in chunks, pictures of a cache, and what a step will cost.

Nothing else in the core depends on them.
"""

from negcache_core.tools.chunks import in_chunks
from negcache_core.tools.plot import plot_cache
from negcache_core.tools.step_cost import scaling
from negcache_core.tools.step_cost_report import Scaling

__all__ = ["Scaling", "in_chunks", "plot_cache", "scaling"]
