"""The reference has every public name: one that is missing is a warning, and so stops the build."""

import importlib
from typing import Any

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging

logger = logging.getLogger(__name__)
PACKAGES = (
    "negcache_core",
    "negcache_core.exact",
    "negcache_core.testing",
    "negcache_torch",
    "negcache_tensorflow",
    "negcache_jax",
    "negcache_keras",
    "negcache_sentence_transformers",
)


def setup(app: Sphinx) -> dict[str, Any]:
    """Check the reference once all pages are read."""
    app.connect("env-check-consistency", check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def check(app: Sphinx, env: BuildEnvironment) -> None:
    """Warn of each name that a package exports and no page describes."""
    del app
    described = env.get_domain("py").objects
    for package in PACKAGES:
        module = importlib.import_module(package)
        public = getattr(module, "__all__", None) or [
            name
            for name, value in vars(module).items()
            if getattr(value, "__module__", None) == package and not name.startswith("_")
        ]
        for name in public:
            if f"{package}.{name}" not in described:
                logger.warning("%s.%s is public and has no entry in the reference", package, name)
