"""The conformance kit: what every adapter must pass, compared with the NumPy reference.

    from negcache_core import testing
    testing.check_adapter(testing.Adapter("mine", my_module, my_asarray, numpy.asarray))

Most checks run one script on the adapter and on NumPy, with the same inputs and the same noise, and
compare everything that comes out. The others hold it to a rule: a failed step changes nothing; a
loaded handler draws what the saved one would have; an estimator's gradient is expected to be the
exact one; shards are the one big cache. `CHECKS` names them, for a test runner to list one by one.

`DictCache` is the model of a manager's updates. `Threads` are replicas' engine in one process.
"""

from negcache_core.testing._adapter import NUMPY_ADAPTER, Adapter, bind
from negcache_core.testing._checks import CHECKS, check_adapter
from negcache_core.testing._model import DictCache
from negcache_core.testing._threads import Threads

__all__ = ["CHECKS", "NUMPY_ADAPTER", "Adapter", "DictCache", "Threads", "bind", "check_adapter"]
