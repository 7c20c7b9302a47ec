"""The import graph: the core imports no framework, and no adapter imports another.

An integration with a library of a framework imports that, and the framework's adapter.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FRAMEWORKS = {"torch", "tensorflow", "keras", "jax", "jaxlib", "flax"}
ADAPTERS = {
    "negcache_torch": "torch",
    "negcache_tensorflow": "tensorflow",
    "negcache_jax": "jax",
}
INTEGRATIONS = {  # and what each imports of those above
    "negcache_keras": {"keras"},
    "negcache_sentence_transformers": {"negcache_torch", "torch"},
}
ARRAY_LIBRARIES = {"array_api_compat", "array_api_extra"}
THE_DOOR = "_array.py"
# Arrows in one direction only: each room may import those before it, and itself.
LEVELS = (
    {"errors"},
    {"files"},
    {"arrays"},
    {"cache"},
    {"retrieval"},
    {"losses"},
    {"sharding"},
    {"handlers"},
    {"tools"},
    {"unbound", "exact"},
    {"adapter"},
    {"testing", "__main__"},
)


def imports_of(path):
    """Return the full names of the modules that a file imports, wherever it does so."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module)
    return found


def backend_of(path):
    """Return what the file for one of Keras's backends may import: it alone is imported there."""
    name = path.name.strip("_").removesuffix(".py")
    return {name, f"negcache_{name}"} if f"negcache_{name}" in ADAPTERS else set()


def offences(root):
    """Return what breaks the rules in a tree of the project's layout, as readable lines."""
    found = []
    for path in sorted((root / "negcache_core").rglob("*.py")):
        tops = {name.partition(".")[0] for name in imports_of(path)}
        bad = tops & (FRAMEWORKS | set(ADAPTERS) | set(INTEGRATIONS))
        if path.name != THE_DOOR:
            bad |= tops & ARRAY_LIBRARIES
        found += [f"{path.name} imports {name}" for name in sorted(bad)]
    allowed = {adapter: {adapter, framework} for adapter, framework in ADAPTERS.items()}
    allowed |= {
        integration: {integration, *imported} for integration, imported in INTEGRATIONS.items()
    }
    for package, own in allowed.items():
        for path in sorted((root / "adapters" / package).rglob("*.py")):
            tops = {name.partition(".")[0] for name in imports_of(path)}
            allowed_here = own | (backend_of(path) if package == "negcache_keras" else set())
            bad = tops & ((FRAMEWORKS | set(ADAPTERS) | set(INTEGRATIONS)) - allowed_here)
            found += [f"{package}/{path.name} imports {name}" for name in sorted(bad)]
    return found


def test_the_rules_hold():
    assert offences(ROOT) == []


@pytest.mark.parametrize(
    ("place", "line", "expected"),
    [
        ("negcache_core/scoring.py", "import torch", "scoring.py imports torch"),
        (
            "negcache_core/testing/kit.py",
            "def f():\n    from jax import numpy",
            "kit.py imports jax",
        ),
        (
            "negcache_core/plans.py",
            "import array_api_compat.numpy",
            "plans.py imports array_api_compat",
        ),
        (
            "adapters/negcache_torch/losses.py",
            "import negcache_tensorflow",
            "negcache_torch/losses.py imports negcache_tensorflow",
        ),
        (
            "adapters/negcache_torch/losses.py",
            "import negcache_sentence_transformers",
            "negcache_torch/losses.py imports negcache_sentence_transformers",
        ),
        (
            "adapters/negcache_sentence_transformers/loss.py",
            "import jax, negcache_torch, torch",
            "negcache_sentence_transformers/loss.py imports jax",
        ),
        (
            "adapters/negcache_keras/_torch.py",
            "import negcache_torch, negcache_jax",
            "negcache_keras/_torch.py imports negcache_jax",
        ),
        (
            "adapters/negcache_keras/layer.py",
            "import tensorflow",
            "negcache_keras/layer.py imports tensorflow",
        ),
        (
            "adapters/negcache_tensorflow/handlers.py",
            "import keras",
            "negcache_tensorflow/handlers.py imports keras",
        ),
    ],
)
def test_a_planted_offence_is_caught(tmp_path, place, line, expected):
    path = tmp_path / place
    path.parent.mkdir(parents=True)
    path.write_text(line)
    assert offences(tmp_path) == [expected]


def upward_arrows(core):
    """Return the imports of a core that lead to a later room, or to a sibling on its level."""
    level_of = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
    found = []
    for path in sorted(core.rglob("*.py")):
        room = path.relative_to(core).parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        for name in sorted(imports_of(path)):
            _, _, other = name.partition("negcache_core.")
            other = other.split(".")[0]
            if other and other != room and level_of[other] >= level_of[room]:
                found.append(f"{path.relative_to(core)} imports {name}")
    return found


def test_every_room_has_a_level():
    core = ROOT / "negcache_core"
    rooms = {path.name.removesuffix(".py") for path in core.iterdir() if path.name[0] != "_"}
    assert {"__main__"} | rooms - {"py.typed"} == set().union(*LEVELS)


def test_the_cores_own_arrows_point_one_way():
    assert upward_arrows(ROOT / "negcache_core") == []


def test_a_planted_upward_arrow_is_caught(tmp_path):
    path = tmp_path / "cache" / "plans.py"
    path.parent.mkdir()
    path.write_text("from negcache_core.losses.results import CacheLoss")
    assert upward_arrows(tmp_path) == ["cache/plans.py imports negcache_core.losses.results"]


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("negcache_core", FRAMEWORKS),
        ("negcache_core.testing", FRAMEWORKS),
        ("negcache_torch", {"tensorflow", "jax"}),
        ("negcache_jax", {"torch", "tensorflow"}),
        ("negcache_tensorflow", {"torch"}),  # TensorFlow itself imports jax
    ],
)
def test_importing_loads_no_other_framework(module, forbidden):
    code = f"import sys, {module}; print(sorted({forbidden!r} & set(sys.modules)))"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert out.stdout.strip() == "[]"
