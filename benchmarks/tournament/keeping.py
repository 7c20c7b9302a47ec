"""Tasks in files: only arrays, in the smallest integers that hold them."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from .task import Questions, Task

TOKENS = ("queries", "items")
QUESTIONS = ("validation", "test")


def kept(path: Path, mine: Callable[[], Task]) -> Task:
    """Return the task in `path`; if there is none, mine it and keep it there first."""
    if not path.exists():
        save(path, mine())
    return load(path)


def save(path: Path, task: Task) -> None:
    """Write a task to `path`, an .npz file, whole or not at all."""
    arrays = task._asdict()
    for name in QUESTIONS:
        questions = arrays.pop(name)
        arrays |= {f"{name}_{key}": table for key, table in questions._asdict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.stem}.{os.getpid()}.npz")
    np.savez_compressed(part, **{key: _small(array) for key, array in arrays.items()})
    part.replace(path)  # for a process that reads it at the same time


def load(path: Path) -> Task:
    """Return the task that `save` wrote."""
    with np.load(path) as file:
        arrays = {
            key: table.astype(np.int32 if key in TOKENS else np.int64)
            for key, table in file.items()
        }
    for name in QUESTIONS:
        arrays[name] = Questions(*(arrays.pop(f"{name}_{key}") for key in Questions._fields))
    sizes = {key: int(arrays[key]) for key in ("query_buckets", "item_buckets")}
    return Task(**{**arrays, **sizes})


def _small(given: np.ndarray | int) -> np.ndarray:
    """Return numbers from 0 in the smallest unsigned integers that hold them."""
    array = np.asarray(given)
    return array.astype(np.min_scalar_type(array.max()))
