"""Files of named arrays, in safetensors: written completely or not at all, checked when read."""

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from negcache_core.errors import CheckpointError, KindError

FORMAT = "negcache 1"
"""Stands in the metadata of each file; another number would be another layout."""


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a path to write to; if the block ends without an error, that file replaces `path`.

    So `path` holds the complete old or new file, whenever the process is killed: the new one
    is on disk before it is renamed. After an error the old file stays. A killed process may leave
    a half-written file `.<name>.<random>.partial` in the same folder.

    Raises KindError if `path` is not a path, and OSError if it cannot be written.

    >>> import pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "weights"
    >>> with replacing(path) as partial:
    ...     _ = partial.write_text("all of it")
    >>> path.read_text()
    'all of it'
    """
    target = as_path(path)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
    try:
        partial.touch()
        mode = partial.stat().st_mode  # which a writer with its own temporary file narrows
        yield partial
        partial.chmod(mode)
        _sync(partial)
        partial.replace(target)
        if os.name == "posix":  # a rename is on disk once its folder is
            _sync(target.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_arrays(
    path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray[Any, Any]], notes: Any
) -> None:
    """Write arrays, and notes that JSON can hold, with a digest of both; atomically."""
    arrays = {key: np.require(array, requirements="C") for key, array in arrays.items()}
    text = json.dumps(notes, default=lambda value: np.asarray(value).tolist())
    metadata = {"format": FORMAT, "notes": text, "sha256": _digest(arrays, text)}
    with replacing(path) as partial:
        save_file(arrays, partial, metadata=metadata)


def read_arrays(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray[Any, Any]], Any]:
    """Return the arrays and the notes of a file that `write_arrays` wrote.

    Raises CheckpointError if it is truncated, corrupted, or another kind of file, and OSError if
    it cannot be read.
    """
    source = as_path(path)
    try:
        with safe_open(source, framework="np") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise CheckpointError(
                    f"{source} has format {metadata.get('format')!r}: expected {FORMAT!r}, as "
                    "written by a handler's save."
                )
            arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no dict
    except SafetensorError as error:
        raise CheckpointError(
            f"{source} is not a complete safetensors file ({error}): it was truncated, "
            "overwritten, or written by something else. Load an earlier checkpoint."
        ) from error
    text = metadata.get("notes", "")
    if metadata.get("sha256") != _digest(arrays, text):
        raise CheckpointError(
            f"{source} is corrupted: its contents do not match the digest that was saved with "
            "them. Load an earlier checkpoint."
        )
    return arrays, json.loads(text)


def as_path(path: Any) -> Path:
    """Return `path` as a Path; raise KindError unless it is one, or a str."""
    if not isinstance(path, str | os.PathLike) or isinstance(os.fspath(path), bytes):
        raise KindError(f"path is {path!r}: expected a str or a pathlib.Path.")
    return Path(path)


def _digest(arrays: Mapping[str, np.ndarray[Any, Any]], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for key in sorted(arrays):
        array = arrays[key]
        digest.update(f"{key}\0{array.dtype.name}\0{array.shape}\0".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
