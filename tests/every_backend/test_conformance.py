import pytest
from backends import BACKENDS

from negcache_core.testing import CHECKS

TRACED = ("tf.function", "tf.function+xla", "jax.jit")
EAGER_ONLY = ("prefill", "rollback", "files", "front_door", "evaluation")  # these trace nothing


@pytest.mark.parametrize(
    ("name", "check"),
    [
        (name, check)
        for name in BACKENDS
        for check in CHECKS
        if not (name in TRACED and check in EAGER_ONLY)
    ],
)
def test_backend_passes_the_conformance_kit(name, check):
    CHECKS[check](BACKENDS[name])
