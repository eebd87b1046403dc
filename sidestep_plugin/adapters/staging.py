"""Saves a folder so that it is there as a whole or not at all, whenever the program is killed or the power goes.

Upstream and PEFT write in place: killed in the middle they would leave half an adapter, or a good one half overwritten.
So a save goes into a hidden folder beside its place. When everything in it is on the disk, it is renamed; an earlier
folder of that name is renamed away first and removed afterwards. Killed between the two renames, the earlier one is
put back by :func:`settle`, which runs before anything is saved to that name or looked for.
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

_NEW: Final = "saving"
_OLD: Final = "replaced"
_RANDOM: Final = "[0-9a-f]" * 8

_WEIGHTS: Final = frozenset({"adapter_model.safetensors", "adapter_model.bin", "lokr_weights.safetensors"})
_BESIDE_WEIGHTS: Final = frozenset(
    {"adapter_config.json", "README.md", "training_config.json", "training_state.pt", "resume_state.pt"}
    | {"comfyui_lora.safetensors", "comfyui_lokr.safetensors"}
)
"""Files that belong to the weights beside them. When those are replaced, they go; anything else in a folder stays."""


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A new folder beside the one that is to be saved. It is removed at the end with whatever is left in it.

    Raises:
        OSError: the folder cannot be written, or there is something of its name that is not a folder.
    """
    import shutil  # imported here, as others are: a command that only prints its help needs none of them

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
    """Put what was staged in its place: also when a plugin failed in the block, for upstream itself has not.

    Not when it was broken off (Ctrl-C): what lacks a part would look whole.

    Raises:
        OSError: it cannot be put there. The earlier folder is as it was.
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
    """Finish what a killed program left beside a folder: put the earlier one back, remove what was not finished."""
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
    """The same for every folder below one."""
    for left in [*folder.rglob(f".*.{_RANDOM}.{_OLD}"), *folder.rglob(f".*.{_RANDOM}.{_NEW}")]:
        settle(left.with_name(left.name[1:].rsplit(".", 2)[0]))


def _keep_the_rest(old: Path, folder: Path) -> None:
    """Move what the new save does not replace: a user's notes, another kind of adapter in the same folder."""
    replaced = {file.parent for file in folder.rglob("*") if file.name in _WEIGHTS}
    for file in sorted(file for file in old.rglob("*") if file.is_file()):
        place = folder / file.relative_to(old)
        if not place.exists() and not (place.parent in replaced and file.name in _WEIGHTS | _BESIDE_WEIGHTS):
            place.parent.mkdir(parents=True, exist_ok=True)
            move(file, place)


def _to_disk(folder: Path) -> None:
    """Wait until every file below a folder is on the disk: a rename may otherwise get there before its content."""
    for place, _, names in os.walk(folder):
        for name in names:
            with (Path(place) / name).open("rb+") as stream:
                os.fsync(stream.fileno())
        _sync_folder(Path(place))


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":
        return  # there, folders cannot be opened, and need not be
    with contextlib.suppress(OSError):  # some file systems have no such thing
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
