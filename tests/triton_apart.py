"""Triton for the programs of tests: it is installed apart, see the Makefile."""

import importlib.util
import os
import platform
import sys
from pathlib import Path

import pytest

APART = Path(sys.prefix) / "triton"


def interpreting():
    """Return the environment of a program that runs kernels in Triton's interpreter."""
    if not APART.exists() and importlib.util.find_spec("triton") is None:
        if (platform.system(), platform.machine()) == ("Linux", "x86_64"):
            pytest.fail("there is no Triton: run `make test`, which installs it.")
        pytest.skip("Triton is for Linux on x86-64")
    return {
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([*sys.path, str(APART)]),
    }
