"""What is published: the wheel and the sdist, what they ask for, and that both are whole."""

import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import BytesParser
from pathlib import Path

import numpy as np
import pytest
import smoke
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import negcache_core

SAFELY = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # Python 3.11.4 has it
ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGES = [ROOT / "negcache_core", *sorted((ROOT / "adapters").glob("negcache_*"))]
INFO = f"negcache-{negcache_core.__version__}.dist-info"
# Tools of a checkout: of these one version is pinned, and none is a user's.
TOOLS = ("lint", "docs", "dist", "audit")


def build(tree, out, *targets):
    """Build with the backend that stands here: no network, and a second at most."""
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(out)]
    command += [word for target in targets for word in ("-t", target)]
    subprocess.run(command, cwd=tree, check=True, capture_output=True, timeout=120)
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"), None)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build(ROOT, tmp_path_factory.mktemp("dist"), "wheel", "sdist")


def contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_wheel_holds_the_packages_their_licence_and_nothing_else(built):
    sources = {
        path.relative_to(package.parent).as_posix(): path
        for package in PACKAGES
        for path in (*package.rglob("*.py"), *package.rglob("*.pyi"), package / "py.typed")
    }
    files = contents(built[0])
    added = {f"{INFO}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "licenses/LICENSE")}
    assert set(files) == set(sources) | added
    assert all(files[name] == path.read_bytes() for name, path in sources.items())
    assert files[f"{INFO}/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()


def test_the_sdist_builds_the_same_wheel_and_can_be_tested(built, tmp_path):
    with tarfile.open(built[1]) as archive:
        archive.extractall(tmp_path, **SAFELY)  # noqa: S202 - built above
    (tree,) = tmp_path.iterdir()
    rebuilt, _ = build(tree, tmp_path, "wheel")
    assert rebuilt.read_bytes() == built[0].read_bytes()
    kept = {path.relative_to(tree).parts[0] for path in tree.rglob("*") if path.is_file()}
    assert kept >= {"LICENSE", "README.md", "CHANGELOG.md", "Makefile", "constraints.txt"}
    assert kept >= {"tests", "docs", "examples", "benchmarks"}
    assert not kept & {".ci", ".github", ".git", ".venv", "dist", "runs"}
    assert not list(tree.rglob("__pycache__"))


def test_the_metadata_say_what_this_is(built):
    files = contents(built[0])
    metadata = BytesParser().parsebytes(files[f"{INFO}/METADATA"])
    assert metadata["Name"] == "negcache"
    assert metadata["Version"] == negcache_core.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Description-Content-Type"] == "text/markdown"
    requirements = [Requirement(line) for line in metadata.get_all("Requires-Dist")]
    always = {each.name for each in requirements if each.marker is None}
    assert always <= {"numpy", "array-api-compat", "ml-dtypes", "safetensors"}  # no framework
    assert {"torch", "tensorflow", "jax"} <= set(metadata.get_all("Provides-Extra"))
    oldest = SpecifierSet(metadata["Requires-Python"])
    named = re.findall(r"Python :: (3\.\d+)", files[f"{INFO}/METADATA"].decode())
    assert named
    assert all(version in oldest for version in named)


def requirements_of_users():
    """Return what is asked for, tools aside: canonical name -> requirement."""
    extras = PROJECT["optional-dependencies"]
    lines = PROJECT["dependencies"] + [
        line for extra, lines in extras.items() if extra not in TOOLS for line in lines
    ]
    found = [Requirement(line) for line in lines]
    return {canonicalize_name(each.name): each for each in found if each.name != "negcache"}


def pins(name):
    """Return the lines of a constraints file: canonical name -> requirement."""
    lines = (line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    found = [Requirement(line) for line in lines if line]
    return {canonicalize_name(each.name): each for each in found}


def test_the_lowest_versions_tested_are_the_lowest_allowed():
    pinned = pins("constraints-lowest.txt")
    for name, requirement in requirements_of_users().items():
        lower = [each.version for each in requirement.specifier if each.operator in {">=", "=="}]
        assert [f"=={version}" for version in lower] == [str(pinned[name].specifier)], name


def test_what_ci_runs_with_is_pinned_and_allowed():
    pinned = pins("constraints.txt")
    for name, requirement in requirements_of_users().items():
        (pin,) = pinned[name].specifier
        assert pin.operator == "==", name
        assert pin.version.removesuffix(".*") in requirement.specifier, name


STEPS = {"numpy": smoke.in_numpy, **smoke.STEPS}


@pytest.mark.parametrize("name", STEPS)
def test_the_smoke_test_of_an_installation_holds_here(name):
    smoke.check(STEPS[name])


@pytest.mark.parametrize("index", [0, 1])
def test_the_smoke_test_can_fail(index):
    loss, gradient = smoke.closed_form()
    wrong = [(loss * 1.001, gradient), (loss, gradient * 1.001)][index]
    assert smoke.check(lambda: (loss, gradient)) == loss
    with pytest.raises(AssertionError):
        smoke.check(lambda: wrong)
    assert not np.allclose(gradient, 0)
