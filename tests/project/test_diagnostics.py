"""`python -m negcache_core` answers whatever is installed, and however broken it is."""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import negcache_core
from negcache_core import __main__ as diagnostics

ROOT = Path(__file__).parents[2]
# By way of the command line, as a user does; adapters before the planted packages would be stale.
PATHS = (str(ROOT), str(ROOT / "adapters"))


def lines_of(*planted):
    """Run the report with `planted` folders first on the path: name -> line."""
    path = os.pathsep.join((*map(str, planted), *PATHS))
    done = subprocess.run(
        [sys.executable, "-m", "negcache_core"],
        capture_output=True,
        check=True,
        env={**os.environ, "PYTHONPATH": path},
        text=True,
        timeout=300,
    )
    return dict(line.split(maxsplit=1) for line in done.stdout.splitlines())


def plant(folder, **modules):
    for name, source in modules.items():
        (folder / f"{name}.py").write_text(source)
    return folder


def test_what_is_there_is_named_with_its_devices():
    lines = lines_of()
    assert lines["negcache"].startswith(negcache_core.__version__)
    for name in (
        "numpy",
        "array-api-compat",
        "torch",
        "tensorflow",
        "jax",
        "jaxlib",
        "lightning",
        "flax",
    ):
        assert lines[name] == metadata.version(name)
    assert lines["negcache_torch"].startswith(f"torch {metadata.version('torch')}")
    assert "cpu" in lines["negcache_torch"]
    assert lines["negcache_tensorflow"].startswith("tensorflow ")
    assert "CPU:0" in lines["negcache_tensorflow"]
    assert lines["negcache_jax"].startswith(f"jax {metadata.version('jax')} on ")


def test_what_is_broken_or_absent_stands_on_its_line(tmp_path):
    """One framework raises and talks, one takes its process down, one is not there."""
    lines = lines_of(
        plant(
            tmp_path,
            torch='print("hello"); raise OSError("libcudart.so.12:\\n  cannot open")',
            tensorflow="import os; os.kill(os.getpid(), 9)",
            jax="raise ModuleNotFoundError(\"No module named 'jax'\", name='jax')",
        )
    )
    assert lines["negcache_torch"] == "OSError: libcudart.so.12: cannot open"
    assert lines["negcache_tensorflow"] == "its process died of SIGKILL"
    assert lines["negcache_jax"] == "ModuleNotFoundError: No module named 'jax'"
    assert lines["numpy"] == metadata.version("numpy")


def test_a_distribution_that_is_not_installed_is_said_so(monkeypatch):
    monkeypatch.setattr(diagnostics, "DISTRIBUTIONS", ("numpy", "no-such-distribution"))
    monkeypatch.setattr(diagnostics, "DEVICES", {})
    lines = dict(line.split(maxsplit=1) for line in diagnostics.report().splitlines())
    assert lines["no-such-distribution"] == "not installed"


def test_a_framework_that_leaves_is_told_apart(tmp_path, monkeypatch):
    planted = str(plant(tmp_path, torch="raise SystemExit(3)"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((planted, *PATHS)))
    found = diagnostics._look_from_outside("negcache_torch")
    assert found == "its process ended with status 3 and said: nothing"


def test_a_framework_that_hangs_is_given_up(tmp_path, monkeypatch):
    planted = str(plant(tmp_path, torch="import time; time.sleep(60)"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((planted, *PATHS)))
    monkeypatch.setattr(diagnostics, "SECONDS", 1)
    assert diagnostics._look_from_outside("negcache_torch") == "no answer within 1 seconds"
