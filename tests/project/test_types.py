"""What type checkers know: the stubs say what is made at run time, and users' programs pass."""

import ast
import importlib
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import negcache_jax
import negcache_tensorflow
import negcache_torch
import pytest

from negcache_core.adapter import Bound

ADAPTERS = (negcache_torch, negcache_tensorflow, negcache_jax)
IMPORTS = {
    "torch": "import torch as xp\nimport negcache_torch as negcache",
    "tensorflow": "import tensorflow as xp  # type: ignore[import-untyped]\n"
    "import negcache_tensorflow as negcache",
    "jax": "import jax.numpy as xp\nimport jax\nimport negcache_jax as negcache",
}
SETUP = """
from typing import Any, assert_type

handler: negcache.CacheLossHandler = negcache.CacheLossHandler(
    negcache.CacheManager({name: negcache.FieldSpec((2,), "float32") for name in "xe"}, 8),
    negcache.CacheClassificationLoss("e", ("x",)),
    embedding_key="e",
    data_keys=("x",),
)
x = xp.eye(2)
"""
STEPS = {
    "torch": """
def tower(features: dict[str, xp.Tensor]) -> xp.Tensor:
    return features["x"]

loss = handler.update_cache_and_compute_loss(tower, x, x, {"x": x})
assert_type(loss, xp.Tensor)
assert_type(handler(tower, x, x, {"x": x}), xp.Tensor)
assert_type(handler.cache, negcache.NegativeCache)
xp.optim.SGD(handler.parameters())
""",
    "tensorflow": """
loss = handler.update_cache_and_compute_loss(lambda features: features["x"], x, x, {"x": x})
assert_type(handler.cache, negcache.NegativeCache)
loss.numpy()
""",
    "jax": """
def tower(features: dict[str, jax.Array]) -> jax.Array:
    value: jax.Array = features["x"]
    return value

state = handler.init(jax.random.key(0))
loss, state = handler.update_cache_and_compute_loss(state, tower, x, x, {"x": x})
assert_type(loss, jax.Array)
assert_type(state, negcache.HandlerState)
bound = handler.bind(handler.refresh(state, tower, 2))
assert_type(bound.cache, negcache.NegativeCache)
assert_type(bound.state, negcache.HandlerState)
handler.cache_loss.retrieve(x, bound.cache, key=jax.random.key(1))
""",
}
SHARED = """
found: negcache.Retrieval
error: type[ValueError] = negcache.ShapeError
assert_type(negcache.EMPTY, int)
negcache.losses.CacheClassificationLoss("e", ("x",), retrieval_fn=negcache.MaxScoreRetrievalFn())
negcache.MultiCacheLossHandler({}, handler.cache_loss, "e", ("x",))
"""
WRONG = {
    'negcache.CacheManager({}, cache_size="many")': "arg-type",
    'negcache.CacheManager({}, 8, size="8")': "call-arg",
    "negcache.no_such_name": "attr-defined",
}


def stub_of(package):
    """Return what a stub declares, private names aside: name -> class or function."""
    text = (Path(package.__file__).parent / "_bound.pyi").read_text()
    nodes = [
        node for node in ast.parse(text).body if isinstance(node, ast.ClassDef | ast.FunctionDef)
    ]
    return {node.name: node for node in nodes if not node.name.startswith("_")}


def cases():
    for package in ADAPTERS:
        for name, node in stub_of(package).items():
            if isinstance(node, ast.ClassDef):
                yield pytest.param(package, name, id=f"{package.__name__}.{name}")


def named(parameters):
    """Return names of a run-time signature but for self, *arguments and **options."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [each.name for each in parameters if each.name != "self" and each.kind not in kinds]


@pytest.mark.parametrize("package", ADAPTERS, ids=lambda package: package.__name__)
def test_a_stub_declares_what_is_bound(package):
    bound = importlib.import_module(f"{package.__name__}._bound")
    assert set(stub_of(package)) == set(Bound._fields)
    assert all(hasattr(bound, name) for name in Bound._fields)


@pytest.mark.parametrize(("package", "name"), list(cases()))
def test_a_class_is_what_its_stub_says(package, name):
    stub, bound = stub_of(package)[name], getattr(package, name)
    own = [
        base
        for base in bound.__bases__
        if base.__module__.startswith(package.__name__) and base.__name__ not in Bound._fields
    ]
    known = [base.__name__ for base in bound.__bases__ if base not in own]
    assert [ast.unparse(base).rpartition(".")[2] for base in stub.bases] == known
    core = next(base for base in bound.__bases__ if base.__module__.startswith("negcache_core"))
    assert core.__name__ == name
    methods = {node.name: node.args for node in stub.body if isinstance(node, ast.FunctionDef)}
    for method, arguments in methods.items():
        said = [each.arg for each in (*arguments.args, *arguments.kwonlyargs)][1:]
        parameters = inspect.signature(getattr(bound, method)).parameters.values()
        if len(named(parameters)) + 1 < len(parameters):  # it hands the rest to the core's
            held = [vars(each)[method] for each in core.__mro__ if method in vars(each)]
            whole = held[0] if held else bound.forward
            if method == "__call__" and hasattr(core, "update_cache_and_compute_loss"):
                whole = core.update_cache_and_compute_loss  # what calling a handler does
            parameters = inspect.signature(whole).parameters.values()
            said = [each for each in said if each not in ("state", "key")]
        assert said == named(parameters), method
    added = {
        method
        for base in own
        for each in base.__mro__
        for method, value in vars(each).items()
        if each.__module__.startswith(package.__name__) and inspect.isfunction(value)
    }
    missing = {method for method in added if not method.startswith("_")} - set(methods)
    assert all(hasattr(core, method) for method in missing), missing


def test_a_users_program_passes_and_mistakes_are_reported(tmp_path):
    for name, imports in IMPORTS.items():  # one run for all: most of it is reading PyTorch
        (tmp_path / f"good_{name}.py").write_text(imports + SETUP + STEPS[name] + SHARED)
        (tmp_path / f"wrong_{name}.py").write_text("\n".join([imports, *WRONG]))
    # Nothing is kept: to write what is known of PyTorch takes longer than it is worth here.
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file="]
    command += [f"--cache-dir={os.devnull}", "."]
    run = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False
    )
    found = re.findall(r"^(\w+)\.py:(\d+): error: .*\[([\w-]+)\]$", run.stdout, re.MULTILINE)
    expected = {
        (f"wrong_{name}", str(line), code)
        for name, imports in IMPORTS.items()
        for line, code in enumerate(WRONG.values(), imports.count("\n") + 2)
    }
    assert set(found) == expected, run.stdout + run.stderr
