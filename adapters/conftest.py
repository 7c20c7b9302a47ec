"""What pytest looks for doctests in: a module whose library is missing cannot be imported."""

import importlib.util

collect_ignore = [] if importlib.util.find_spec("triton") else ["negcache_torch/_fused_kernels.py"]
