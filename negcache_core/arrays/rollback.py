"""Undoing what a step has drawn when it fails."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any


class UndoneOnError(AbstractContextManager[None]):
    """A context that calls functions, such as those of `Backend.remember`, on an error.

    So a step that fails has drawn nothing, and the next one runs as if it had never happened.
    """

    def __init__(self, undo: Iterable[Callable[[], Any] | None]) -> None:
        self._undo = [each for each in undo if each is not None]

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, *error: object) -> None:
        if kind is not None:
            for undo in self._undo:
                undo()
