import pytest
from backends import BACKENDS

from negcache_core.testing import CHECKS


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", BACKENDS)
def test_backend_agrees_with_numpy(name, check):
    CHECKS[check](BACKENDS[name])
