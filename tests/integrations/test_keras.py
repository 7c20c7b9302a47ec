"""The Keras layer on each of Keras's backends: one process each, since a process has one."""

import os
from pathlib import Path

import pytest
from programs import ONE_THREAD, run

CHECKS = [Path(__file__).with_name(name) for name in ("keras_checks.py", "keras_backend_checks.py")]
FLAGS = os.environ.get("XLA_FLAGS", "")
SETTINGS = {
    "tensorflow": {},
    "jax": {"XLA_FLAGS": f"{FLAGS} --xla_force_host_platform_device_count=2"},
    "torch": {},
}


@pytest.mark.parametrize("backend", SETTINGS)
def test_the_checks_hold_on(backend, tmp_path):
    words = ("-m", "pytest", *CHECKS, "--noconftest", "-qq", "--tb=short", "--no-header")
    plugins = ("-p", "no:xdist", "-p", "no:cacheprovider")
    compiled = {  # models of the same kind share what JAX compiles
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    environment = {**ONE_THREAD, **compiled, **SETTINGS[backend]}
    run(*words, *plugins, KERAS_BACKEND=backend, **environment)
