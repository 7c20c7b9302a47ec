"""Nothing that negcache, its examples or its benchmarks load can run code."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("negcache_core", "adapters", "examples", "benchmarks")
PICKLES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
RUNS_CODE = {"eval", "exec", "compile", "__import__"}
# Where a keyword makes loading safe: function -> keyword, value, whether it is the default.
KEYWORDS = {
    "torch.load": ("weights_only", True, False),
    "np.load": ("allow_pickle", False, True),
    "numpy.load": ("allow_pickle", False, True),
    "load_model": ("safe_mode", True, True),
}
# These take an object apart or put it together by pickle, whatever their arguments are.
UNSAFE = {"read_pickle", "enable_unsafe_deserialization", "recv_object_list", "unsafe_load"}


def name_of(function):
    """Return the dotted name of what is called, as far as it is one."""
    if isinstance(function, ast.Attribute):
        return f"{name_of(function.value)}.{function.attr}"
    return function.id if isinstance(function, ast.Name) else ""


def modules_of(node):
    if isinstance(node, ast.Import):
        return {alias.name.partition(".")[0] for alias in node.names}
    if isinstance(node, ast.ImportFrom) and not node.level:
        return {node.module.partition(".")[0]}
    return set()


def offence(node):
    """Return what a node of the syntax tree does that it must not, or None."""
    if found := modules_of(node) & PICKLES:
        return f"imports {found.pop()}"
    if isinstance(node, ast.ImportFrom) and f"{node.module}.load" in KEYWORDS:
        # Called by its bare name it would not be seen for what it is.
        return next((f"imports {node.module}.load" for a in node.names if a.name == "load"), None)
    return unsafe_call(node) if isinstance(node, ast.Call) else None


def unsafe_call(node):
    name = name_of(node.func)
    if name in RUNS_CODE or name.rpartition(".")[2] in UNSAFE:
        return f"calls {name}"
    for function, (keyword, safe, default) in KEYWORDS.items():
        if name != function and not name.endswith(f".{function}"):
            continue
        given = {each.arg: each.value for each in node.keywords}  # None: **keywords
        if None in given:
            return f"calls {name} with keywords out of sight"
        if keyword in given and getattr(given[keyword], "value", None) is not safe:
            return f"calls {name} without {keyword}={safe}"
        if keyword not in given and not default:
            return f"calls {name} without {keyword}={safe}"
    return None


def offences(source):
    return [found for node in ast.walk(ast.parse(source)) if (found := offence(node))]


def test_nothing_that_is_loaded_runs_code():
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 60  # they were found
    found = {path.name: offences(path.read_text()) for path in files}
    assert {name: each for name, each in found.items() if each} == {}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("import pickle", "imports pickle"),
        ("def f():\n    from joblib import load", "imports joblib"),
        ("from torch import load", "imports torch.load"),
        ("torch.load(path)", "calls torch.load without weights_only=True"),
        ("torch.load(path, weights_only=False)", "calls torch.load without weights_only=True"),
        ("torch.load(path, weights_only=safe)", "calls torch.load without weights_only=True"),
        ("np.load(path, allow_pickle=True)", "calls np.load without allow_pickle=False"),
        ("np.load(path, **options)", "calls np.load with keywords out of sight"),
        (
            "tf.keras.models.load_model(path, safe_mode=False)",
            "calls tf.keras.models.load_model without safe_mode=True",
        ),
        ("x = eval(text)", "calls eval"),
        ("exec(text)", "calls exec"),
        ("pandas.read_pickle(path)", "calls pandas.read_pickle"),
    ],
)
def test_a_planted_offence_is_caught(line, expected):
    assert offences(line) == [expected]


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path, weights_only=True)",
        "np.load(path)",
        "np.load(path, allow_pickle=False)",
        "tower.eval()",
        "torch.compile(step)",
        "re.compile(pattern)",
        "json.load(file)",
        "from numpy import asarray",
    ],
)
def test_what_is_safe_passes(line):
    assert offences(line) == []
