"""The checks of the conformance kit, by name."""

from collections.abc import Callable

from negcache_core.testing._adapter import Adapter
from negcache_core.testing._cache_checks import (
    check_dtypes,
    check_filter,
    check_manager,
    check_top_k,
    check_unique,
)
from negcache_core.testing._front_door_checks import check_evaluation, check_front_door
from negcache_core.testing._gradient_checks import (
    check_estimators,
    check_gradients,
    check_learning,
)
from negcache_core.testing._handler_checks import (
    check_files,
    check_prefill,
    check_refresh,
    check_rollback,
    check_steps,
)
from negcache_core.testing._loss_checks import check_half, check_loss
from negcache_core.testing._quantized_checks import check_quantized
from negcache_core.testing._replica_checks import check_replicas
from negcache_core.testing._shard_checks import check_shards
from negcache_core.testing._window_checks import check_drift, check_window

CHECKS: dict[str, Callable[[Adapter], None]] = {
    "manager": check_manager,
    "unique": check_unique,
    "dtypes": check_dtypes,
    "top_k": check_top_k,
    "filter": check_filter,
    "loss": check_loss,
    "half": check_half,
    "quantized": check_quantized,
    "gradients": check_gradients,
    "estimators": check_estimators,
    "learning": check_learning,
    "window": check_window,
    "drift": check_drift,
    "steps": check_steps,
    "front_door": check_front_door,
    "evaluation": check_evaluation,
    "prefill": check_prefill,
    "refresh": check_refresh,
    "rollback": check_rollback,
    "files": check_files,
    "replicas": check_replicas,
    "shards": check_shards,
}


def check_adapter(adapter: Adapter) -> None:
    """Run every check; raise AssertionError at the first difference from NumPy."""
    for check in CHECKS.values():
        check(adapter)
