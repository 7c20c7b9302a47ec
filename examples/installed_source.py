"""Python files of the standard library and of installed packages: data that you already have."""

import importlib.util
import os
import sysconfig
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path


def source_files(packages: Iterable[str], skipped: Collection[str]) -> list[tuple[Path, Path]]:
    """Return every file to read, with the folder to which its path is shown relative.

    packages: read besides the standard library if installed; none is imported
    skipped:  names of folders to skip
    """
    library = Path(sysconfig.get_path("stdlib"))
    found = map(importlib.util.find_spec, packages)
    homes = [Path(str(spec.origin)).parent for spec in found if spec is not None]
    folders = [(library, library), *((folder, folder.parent) for folder in homes)]
    return [
        (path, base) for folder, base in folders for path in sorted(_python_files(folder, skipped))
    ]


def _python_files(folder: Path, skipped: Collection[str]) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in skipped]
        yield from (Path(parent, name) for name in files if name.endswith(".py"))
