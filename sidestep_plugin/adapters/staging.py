"""Saves a folder completely or not at all, even if the program is killed or the power fails.

Upstream and PEFT write in place. If they were killed, they would leave half an adapter, or a good adapter partly
overwritten. So an adapter is saved into a hidden folder beside its place. Once everything in it is on disk, the folder
is renamed. An older folder of that name is renamed first and removed afterwards. If the program is killed between the
two renames, :func:`settle` puts the older folder back. It runs before every save to that name, and before every search.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from ..files import move, special_kind
from .kinds import KINDS

_NEW: Final = "saving"
_OLD: Final = "replaced"
_RANDOM: Final = "[0-9a-f]" * 8

_WEIGHTS: Final = frozenset(Path(file).name for kind in KINDS for file in kind.weight_files)
_BESIDE_WEIGHTS: Final = frozenset(
    {"adapter_config.json", "README.md", "training_config.json", "training_state.pt", "resume_state.pt"}
    | {"training_options.toml", *(kind.copy_name for kind in KINDS)}
)
"""Files that belong to the weights beside them and are replaced together. All other files in a folder stay."""

AVERAGE: Final = "average"  # folder beside an adapter for the mean of its training, which is replaced together with it


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A new folder beside the one that will be saved. It is removed at the end with everything that is left in it.

    Raises OSError if the folder cannot be written, or its name is taken by something else.
    """
    import shutil  # imported here because --help does not need it

    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists() and not folder.is_dir():
        what = special_kind(folder) or "regular file"
        raise NotADirectoryError(errno.ENOTDIR, f"{folder.name} is a {what}, expected a folder", str(folder))
    settle(folder)
    stage = folder.with_name(f".{folder.name}.{os.urandom(4).hex()}.{_NEW}")
    stage.mkdir()
    try:
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)


@contextmanager
def published(stage: Path, folder: Path) -> Iterator[None]:
    """Move the staged folder to its place when the block ends. Raises OSError; the older folder is not changed then.

    It is also moved if a plugin fails in the block, because upstream's own save has succeeded. It is not moved after
    Ctrl-C, because an incomplete folder would look complete.
    """
    try:
        yield
    except Exception:
        _put(stage, folder)
        raise
    _put(stage, folder)


def _put(stage: Path, folder: Path) -> None:
    import shutil

    _to_disk(stage)
    if not folder.exists():
        move(stage, folder)
    else:
        old = stage.with_suffix(f".{_OLD}")
        move(folder, old)
        try:
            move(stage, folder)
        except BaseException:
            move(old, folder)
            raise
        _keep_the_rest(old, folder)
        shutil.rmtree(old, ignore_errors=True)
    _sync_folder(folder.parent)


def settle(folder: Path) -> None:
    """Clean up what a killed program left beside a folder: put an older folder back, remove unfinished ones."""
    import glob
    import shutil

    beside = f".{glob.escape(folder.name)}.{_RANDOM}."
    for old in sorted(folder.parent.glob(beside + _OLD)):
        if not folder.exists():
            move(old, folder)
        else:
            shutil.rmtree(old, ignore_errors=True)
    for stage in folder.parent.glob(beside + _NEW):
        shutil.rmtree(stage, ignore_errors=True)


def settle_below(folder: Path) -> None:
    """Do the same for every folder below a folder."""
    for left in [*folder.rglob(f".*.{_RANDOM}.{_OLD}"), *folder.rglob(f".*.{_RANDOM}.{_NEW}")]:
        settle(left.with_name(left.name[1:].rsplit(".", 2)[0]))


def remove_save(folder: Path) -> None:
    """Remove what trainers and plugins have saved in a folder, and the folder unless something else is in it."""
    for place in (folder / "adapter", folder / AVERAGE, folder):
        for name in sorted(_WEIGHTS | _BESIDE_WEIGHTS):
            (place / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            place.rmdir()


def _keep_the_rest(old: Path, folder: Path) -> None:
    """Move files that the new save does not replace, such as notes or another type of adapter in the same folder."""
    replaced = {file.parent for file in folder.rglob("*") if file.name in _WEIGHTS} | {folder / AVERAGE}
    for file in sorted(file for file in old.rglob("*") if file.is_file()):
        place = folder / file.relative_to(old)
        if not place.exists() and not (place.parent in replaced and file.name in _WEIGHTS | _BESIDE_WEIGHTS):
            place.parent.mkdir(parents=True, exist_ok=True)
            move(file, place)


def _to_disk(folder: Path) -> None:
    """Wait until every file below a folder is on disk. Otherwise a rename could reach the disk before the content."""
    for place, _, names in os.walk(folder):
        for name in names:
            with (Path(place) / name).open("rb+") as stream:
                os.fsync(stream.fileno())
        _sync_folder(Path(place))


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":
        return  # folders cannot be opened there, and need not be
    with contextlib.suppress(OSError):  # not supported by some file systems
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
