"""The conformance kit: what every adapter must pass, replayed beside the NumPy reference.

    from negcache_core import testing
    testing.check_adapter(testing.Adapter("mine", my_module, my_asarray, numpy.asarray))

Each check runs one script on the adapter and on NumPy, with the same inputs and the same noise, and
compares everything that comes out. `CHECKS` names them, for a test runner to list one by one.
`DictCache` is the model of a manager's updates.
"""

from negcache_core.testing._adapter import NUMPY_ADAPTER, Adapter, bind
from negcache_core.testing._checks import CHECKS, check_adapter
from negcache_core.testing._model import DictCache

__all__ = ["CHECKS", "NUMPY_ADAPTER", "Adapter", "DictCache", "bind", "check_adapter"]
