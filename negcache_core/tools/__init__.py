"""Beside training: pictures of a cache, and what a step will cost.

Nothing else in the core depends on this room.
"""

from negcache_core.tools.plot import plot_cache
from negcache_core.tools.step_cost import scaling
from negcache_core.tools.step_cost_report import Scaling

__all__ = ["Scaling", "plot_cache", "scaling"]
