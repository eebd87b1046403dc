"""What ``--overwrite`` does with the checkpoints of the training before: they never lie among those of the new one.

They are set aside before the new training begins, and removed when it has saved something. If it ends without having
saved anything, they are put back. A killed program leaves them set aside.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import chain, count
from pathlib import Path
from typing import Final

from ..adapters.staging import remove_save
from ..files import move
from ..text import counted
from .checkpoints import ASIDE, BEGAN, FINISHED, is_checkpoint

_CHECKPOINTS: Final = "checkpoints"
_FINAL: Final = "final"
_PAGE: Final = "index.html"


class Overwriting:
    """One training that replaces another in an output folder, which is locked."""

    def __init__(self, output: Path) -> None:
        self._output = output
        self._moved: list[tuple[Path, Path]] = []
        self._final = _identity(output / _FINAL)

    def begin(self) -> list[str]:
        """Set the checkpoints that are there aside | returns lines for the user."""
        for folder in [*_saves_in(self._output), self._output / FINISHED, self._output / _PAGE]:
            if folder.exists():
                self._moved.append((folder, _free(self._output / ASIDE / folder.relative_to(self._output))))
                self._moved[-1][1].parent.mkdir(parents=True, exist_ok=True)
                move(*self._moved[-1])
        (self._output / BEGAN).unlink(missing_ok=True)
        number = sum(is_checkpoint(there) for _, there in self._moved)
        if number == 0:
            return []
        return [
            f"Note: --overwrite: moved {counted(number, 'checkpoint')} of the earlier training to "
            f"{self._output / ASIDE}, until this training has saved one."
        ]

    def saved(self) -> list[str]:
        """Remove what was set aside if the new training has saved something | returns lines for the user."""
        aside = self._output / ASIDE
        if not aside.is_dir() or (not any(_saves_in(self._output)) and _identity(self._output / _FINAL) == self._final):
            return []
        number = 0
        for folder in _saves_in(aside):
            number += is_checkpoint(folder)
            remove_save(folder)
        for name in (FINISHED, _PAGE):
            (aside / name).unlink(missing_ok=True)
        self._moved.clear()
        _remove_empty(aside)
        removed = counted(number, "checkpoint")
        return [f"Note: removed {removed} of the training that --overwrite replaced."] if number else []

    def end(self) -> list[str]:
        """Put back what was set aside if the new training has saved nothing | returns lines for the user."""
        if lines := self.saved():
            return lines
        number = sum(is_checkpoint(there) for _, there in self._moved)
        for place, there in self._moved:
            with contextlib.suppress(OSError):
                if place.name == _PAGE:  # the page of the training that has saved nothing
                    place.unlink(missing_ok=True)
                if not place.exists():
                    place.parent.mkdir(parents=True, exist_ok=True)
                    move(there, place)
        self._moved.clear()
        _remove_empty(self._output / ASIDE)
        return (
            ["Note: nothing was saved, so the checkpoints of the earlier training are back in place."] if number else []
        )


def _saves_in(output: Path) -> Iterator[Path]:
    """Folders that a training saved on its way; not the final adapter, which the new one replaces itself."""
    below = (folder for folder in sorted(output.glob("*/")) if folder.name != _FINAL and is_checkpoint(folder))
    for folder in chain(below, sorted((output / _CHECKPOINTS).glob("*/"))):
        if not folder.name.startswith("."):
            yield folder


def _identity(folder: Path) -> dict[str, tuple[int, ...]]:
    """Changes when a file in a folder is written or replaced."""
    files = {str(file): file.stat() for file in sorted(folder.rglob("*.safetensors"))}
    return {name: (status.st_ino, status.st_size, status.st_mtime_ns) for name, status in files.items()}


def _free(place: Path) -> Path:
    """A name that nothing has: a killed program may have left one there."""
    names = chain([place], (place.with_name(f"{place.name}-{number}") for number in count(2)))
    return next(name for name in names if not name.exists())


def _remove_empty(folder: Path) -> None:
    for place in (folder / _CHECKPOINTS, folder):
        with contextlib.suppress(OSError):  # not there, or a user's own file is in it
            place.rmdir()
