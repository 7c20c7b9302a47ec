"""The conformance kit: what every adapter must pass, compared with the NumPy reference.

    from negcache_core import testing
    testing.check_adapter(testing.Adapter("mine", my_module, my_asarray, numpy.asarray))

Most checks run a script on the adapter and on NumPy, with the same inputs and the same noise, and
compare everything that comes out. The others check a rule: a failed step changes nothing; a loaded
handler draws what the saved one would have; an estimator's expected gradient is the exact one;
shards equal one big cache. `CHECKS` names them, so that a test runner can list them one by one.

`DictCache` is a model of a manager's updates. `Threads` run replicas in one process.
"""

from negcache_core.testing._adapter import NUMPY_ADAPTER, Adapter, bind
from negcache_core.testing._checks import CHECKS, check_adapter
from negcache_core.testing._model import DictCache
from negcache_core.testing._threads import Threads

__all__ = ["CHECKS", "NUMPY_ADAPTER", "Adapter", "DictCache", "Threads", "bind", "check_adapter"]
