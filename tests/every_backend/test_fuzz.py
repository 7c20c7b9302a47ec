"""Fuzz: whatever is handed in, a call works, or raises an error of the package's own.

And where it raises, rows, ages and the state of generators are bit for bit what they were.
"""

import functools
import json
import warnings
from collections import Counter

import numpy as np
import pytest
from backends import BACKENDS
from fuzzing import Entries, state_of
from hypothesis import given, settings
from hypothesis import strategies as st

from negcache_core import NegcacheError

EXAMPLES = {"numpy": 5, "torch": 4, "tensorflow": 2, "jax": 1}  # times those of the profile
HUGE = (10**7, 3)  # of one value, repeated by strides of 0; where it fits it must be worked on

OBJECTS = {
    "None": None,
    "True": True,
    "0": 0,
    "-1": -1,
    "7": 7,
    "10**30": 10**30,
    "2**63": 2**63,
    "2.5": 2.5,
    "NaN": float("nan"),
    "-inf": -float("inf"),
    "1j": 1j,
    "text": "text",
    "'x'": "x",
    "bytes": b"bytes",
    "object": object(),
    "function": lambda *given, **_: given,
    "()": (),
    "[]": [],
    "[1]": [1],
    "[[1.0], [2.0, 3.0]]": [[1.0], [2.0, 3.0]],
    "['x', 3]": ["x", 3],
    "{}": {},
    "{3: None, 'x': 1}": {3: None, "x": 1},
    "np.float32": np.float32(1.0),
    "object array": np.asarray([None, object()]),
    "text array": np.asarray(["a", "b"]),
    "dates": np.zeros(2, "datetime64[s]"),
    "record": np.zeros(2, "i4,f4"),
    "huge rows": np.broadcast_to(np.float32(1.0), HUGE),
    "huge ids": np.broadcast_to(np.int64(1), HUGE[:1]),
}
SHAPES = [
    (),
    (0,),
    (1,),
    (2,),
    (4,),
    (0, 2),
    (2, 0),
    (2, 1),
    (2, 2),
    (2, 3),
    (3, 2),
    (4, 2),
    (5, 2),
]
SHAPES += [(2, 2, 2), (2, 1, 2), (2, 2, 3), (1, 1, 1, 1)]
DTYPES = ["float32", "float64", "float16", "int32", "int64", "uint8", "uint64", "bool", "complex64"]
FILLS = {"ones": 1, "zeros": 0, "many": 120}


def arrays(backend):
    """Return arrays of any shape and dtype: the library's, NumPy's, lists, and elsewhere."""
    places = ["native", "numpy", "list"] + ["meta", "sparse"] * (backend.name == "torch")

    def make(shape, dtype, fill, place):
        array = np.full(shape, FILLS.get(fill, 1), dtype)
        if fill == "NaN" and array.dtype.kind in "fc":
            array[...] = np.nan
        if place == "list":
            return array.tolist()
        if place == "numpy":
            return array
        array = backend.to_native(array)
        if place == "meta":
            return array.to("meta")
        return array.bool().float().to_sparse() if place == "sparse" else array

    return st.builds(
        make,
        st.sampled_from(SHAPES),
        st.sampled_from(DTYPES),
        st.sampled_from([*FILLS, "NaN"]),
        st.sampled_from(places),
    )


def paths_of(tree, path=()):
    """Return the path to every argument, and to every part of it."""
    found = [path] if path else []
    if hasattr(tree, "_fields"):
        tree = tree._asdict()
    if isinstance(tree, dict):
        for key in tree:
            found += paths_of(tree[key], (*path, key))
    return found


def changed(tree, path, value):
    """Return a tree with `value` at a path."""
    if not path:
        return value
    key, *rest = path
    if hasattr(tree, "_fields"):
        return tree._replace(**{key: changed(getattr(tree, key), rest, value)})
    return {**tree, key: changed(tree[key], rest, value)}


def renamed(tree, path, name):
    """Return a tree whose dict at a path lacks its first key, or has one more of another name."""

    def edit(part):
        if not isinstance(part, dict) or not part:
            return part
        first, *rest = part
        return {
            **{key: part[key] for key in (rest if name is None else part)},
            **({} if name is None else {name: part[first]}),
        }

    part = tree
    for key in path:
        part = getattr(part, key) if hasattr(part, "_fields") else part[key]
    return changed(tree, path, edit(part))


@st.composite
def spoiled(draw, backend, arguments):
    """Return arguments one or two of which, or of their parts, are garbage; and what was done."""
    done = []
    garbage = arrays(backend) | st.sampled_from(sorted(OBJECTS)).map(OBJECTS.get)
    for _ in range(draw(st.integers(1, 2))):
        path = draw(st.sampled_from(paths_of(arguments)))
        how = draw(st.sampled_from(["replace"] * 6 + ["returns", "drop", "add", "number"]))
        if how in {"drop", "add", "number"}:
            arguments = renamed(arguments, path, {"drop": None, "add": "more", "number": 3}[how])
            done.append((path, how))
            continue
        value = draw(garbage)
        done.append((path, how, _short(value)))
        if how == "returns":
            value = functools.partial(lambda value, *_, **__: value, value)
        arguments = changed(arguments, path, value)
    return arguments, done


def _short(value):
    """Return what a value is, for a message."""
    if hasattr(value, "shape"):
        place = getattr(value, "device", "")
        return f"{type(value).__name__} {tuple(value.shape)} {value.dtype} {place}"
    return repr(value)[:60]


@pytest.mark.parametrize("name", EXAMPLES)
def test_garbage_is_refused_by_an_error_of_our_own_and_changes_nothing(
    name, record_property, tmp_path
):
    backend, tried = BACKENDS[name], Counter()
    makers = Entries(backend, tmp_path).makers
    entries = {}

    @settings(max_examples=EXAMPLES[name] * settings.default.max_examples)
    @given(data=st.data())
    def run(data):
        which = data.draw(st.sampled_from(sorted(makers)), label="entry")
        entry = entries.get(which) or entries.setdefault(which, makers[which]())
        arguments, done = data.draw(spoiled(backend, entry.arguments))
        before = state_of(entry.held)
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            try:
                entry.call(**arguments)
            except NegcacheError as error:
                tried[type(error).__name__] += 1
                assert state_of(entry.held) == before, (which, done)
            except Exception as error:
                raise AssertionError(f"{which} {done}: {type(error).__name__}") from error
            else:
                tried["worked"] += 1
                entries.pop(which)  # it may have changed what it holds

    try:
        run()
    finally:
        record_property("fuzzed", json.dumps([name, tried]))
