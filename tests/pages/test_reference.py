"""The reference: every public name is on its package's page, with an example that runs."""

import importlib
import inspect
import sys

import pytest
from run_pages import ROOT

sys.path.insert(0, str(ROOT / "docs" / "_extensions"))

from api_examples import SETUP, examples_of, run
from api_layout import LAYOUTS
from api_objects import arguments_of, has, prose_of
from api_pages import page_of

PACKAGES = sorted(LAYOUTS)


def names_of(package):
    return [name for section in LAYOUTS[package] for name in section.names if has(package, name)]


# In this process: the frameworks are here anyhow, and what they compiled serves other tests too.
@pytest.mark.parametrize("package", PACKAGES)
def test_examples_run(package):
    assert run(package, examples_of(package)) == {}


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_on_the_page_with_an_example(package):
    module = importlib.import_module(package)
    public = {name for name in module.__all__ if not inspect.ismodule(getattr(module, name))}
    assert public - set(names_of(package)) == set()
    assert lacking(package, examples_of(package)) == []


def lacking(package, examples):
    """Return the names that have an example neither in a file nor in their own docstring."""
    assert set(examples) - set(names_of(package)) == {SETUP}  # each is of a name on the page
    return [
        name
        for name in names_of(package)
        if name not in examples and all(each.kind != "example" for each in prose_of(package, name))
    ]


@pytest.mark.parametrize("package", PACKAGES)
def test_every_argument_is_described(package):
    assert [
        f"{name}: {argument.name}"
        for name in names_of(package)
        for argument in arguments_of(package, name)
        if not argument.text
    ] == []


def test_every_name_of_the_layout_is_in_some_package():
    for layout in {LAYOUTS[package] for package in PACKAGES}:
        of_layout = [package for package in PACKAGES if LAYOUTS[package] is layout]
        for section in layout:
            for name in section.names:
                assert any(has(package, name) for package in of_layout), name


def test_a_page_shows_types_in_its_own_terms():
    for package, tensor in (("negcache_torch", "Tensor"), ("negcache_jax", "jax.Array")):
        page = "\n".join(page_of(package))
        assert f"``query_embeddings`` : ``{tensor} (B, D)``" in page
        assert "Array (B, D)" not in page.replace(tensor, "")
        assert "See ``negcache_core" not in page


def test_the_checks_can_fail():
    examples = {SETUP: ">>> two = 2", "right": ">>> two + 2\n4", "wrong": ">>> two + 2\n5"}
    assert list(run("negcache_torch", examples)) == ["wrong"]
    assert list(run("negcache_torch", {SETUP: ">>> 1 / 0"})) == [SETUP]
    examples = examples_of("negcache_torch")
    del examples["CacheLossHandler.prefill"]
    assert lacking("negcache_torch", examples) == ["CacheLossHandler.prefill"]
