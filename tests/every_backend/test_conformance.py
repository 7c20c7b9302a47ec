import pytest
from backends import BACKENDS

from negcache_core.testing import CHECKS

TRACED = ("tf.function", "tf.function+xla", "jax.jit")
EAGER_ONLY = ("prefill", "rollback", "files", "front_door", "evaluation")  # these trace nothing
# Left out where another backend runs the same code of the adapter. JAX without jit compiles each
# operation by itself, for each shape: what jax.jit traces is the same, and takes a fraction. The
# graphs of tf.function are those that XLA compiles.
LEFT_OUT = {
    **dict.fromkeys(TRACED, EAGER_ONLY),
    "jax": ("unique", "dtypes", "loss", "half", "quantized", "window", "drift"),
}
LEFT_OUT["tf.function"] += ("unique", "dtypes", "top_k", "filter", "half", "window")


@pytest.mark.parametrize(
    ("name", "check"),
    [(name, check) for name in BACKENDS for check in CHECKS if check not in LEFT_OUT.get(name, ())],
)
def test_backend_passes_the_conformance_kit(name, check):
    CHECKS[check](BACKENDS[name])
