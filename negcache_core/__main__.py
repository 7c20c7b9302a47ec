"""`python -m negcache_core`: versions, adapters and devices, to paste into a bug report.

`python -m negcache_core negcache_torch` looks at one adapter only. The whole report does that in a
separate process for each, because a framework with broken native code takes its process down.
"""

import importlib
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

from negcache_core import __version__

__all__ = ["report"]

DISTRIBUTIONS = (
    *("numpy", "array-api-compat", "safetensors", "ml-dtypes"),
    *("torch", "lightning", "sentence-transformers", "transformers", "accelerate"),
    *("tensorflow", "keras", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint"),
)
SECONDS = 180.0  # on a cold disk TensorFlow alone takes one of these three minutes


def _torch_devices(torch: Any) -> Iterator[str]:
    yield "cpu"
    for number in range(torch.cuda.device_count()):
        yield f"cuda:{number} ({torch.cuda.get_device_name(number)})"
    if torch.backends.mps.is_available():
        yield "mps"


def _tensorflow_devices(tensorflow: Any) -> Iterator[str]:
    for device in tensorflow.config.list_physical_devices():
        yield device.name.removeprefix("/physical_device:")


def _jax_devices(jax: Any) -> Iterator[str]:
    for device in jax.devices():
        yield f"{device.platform}:{device.id} ({device.device_kind})"


DEVICES: dict[str, tuple[str, Callable[[Any], Iterator[str]]]] = {
    "negcache_torch": ("torch", _torch_devices),
    "negcache_tensorflow": ("tensorflow", _tensorflow_devices),
    "negcache_jax": ("jax", _jax_devices),
}


def _look(adapter: str) -> str:
    """Import an adapter; return one line that says what it found, or what went wrong."""
    try:
        importlib.import_module(adapter)
        name, devices = DEVICES[adapter]
        framework = importlib.import_module(name)
        return f"{name} {framework.__version__} on {', '.join(devices(framework))}"
    except Exception as error:  # noqa: BLE001 - a broken installation can raise anything
        return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _look_from_outside(adapter: str) -> str:
    """Do what `_look` does, in a separate process; if that dies, say so."""
    # JAX would take most of a GPU's memory just to name it.
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    try:
        done = subprocess.run(  # noqa: S603 - this very interpreter and module
            [sys.executable, "-m", "negcache_core", adapter],
            capture_output=True,
            check=False,
            env=environment,
            text=True,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {SECONDS:.0f} seconds"
    if done.returncode < 0:
        return f"its process died of {signal.Signals(-done.returncode).name}"
    if done.returncode or not done.stdout:
        said = done.stderr.strip().splitlines()[-1:] or ["nothing"]
        return f"its process ended with status {done.returncode} and said: {said[0]}"
    return done.stdout.splitlines()[-1]  # frameworks may print on import


def _version_of(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def report() -> str:
    """Return the lines that a bug report needs; no framework is imported into this process.

    One line each for negcache, Python, the distributions it works with, and its adapters: the
    framework's version and devices, or the error that importing it raises.
    """
    with ThreadPoolExecutor() as pool:
        looks = dict(zip(DEVICES, pool.map(_look_from_outside, DEVICES), strict=True))
    lines = {
        "negcache": f"{__version__} in {Path(__file__).parent}",
        "Python": f"{platform.python_version()} ({platform.python_implementation()})",
        "platform": platform.platform(),
        **{name: _version_of(name) for name in DISTRIBUTIONS},
        **looks,
    }
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {line}" for name, line in lines.items())


if __name__ == "__main__":
    print(_look(sys.argv[1]) if sys.argv[1:] else report())
