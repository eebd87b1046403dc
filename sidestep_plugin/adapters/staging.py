"""Saves a folder completely or not at all, even if the program is killed or the power fails.

Upstream and PEFT write in place: a kill would leave half an adapter, or a good one half overwritten. So a save goes
into a hidden folder next to its target, which is renamed when everything in it is on the disk. An earlier folder of
that name is renamed away first and removed afterwards. After a kill between the two renames, :func:`settle` puts the
earlier one back; it runs before anything is saved under that name, and before a training looks for checkpoints.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from ..files import move

_NEW: Final = "saving"
_OLD: Final = "replaced"
_RANDOM: Final = "[0-9a-f]" * 8

_WEIGHTS: Final = frozenset({"adapter_model.safetensors", "adapter_model.bin", "lokr_weights.safetensors"})
_BESIDE_WEIGHTS: Final = frozenset(
    {"adapter_config.json", "README.md", "training_config.json", "training_state.pt", "resume_state.pt"}
    | {"comfyui_lora.safetensors", "comfyui_lokr.safetensors"}
)
"""Files that belong to the weights beside them and are replaced with them; anything else in a folder stays."""


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A new folder next to the one that is to be saved; removed at the end with whatever is left in it."""
    import shutil  # imported here, like others: a command that only prints its help needs none of them

    folder.parent.mkdir(parents=True, exist_ok=True)
    settle(folder)
    stage = folder.with_name(f".{folder.name}.{os.urandom(4).hex()}.{_NEW}")
    stage.mkdir()
    try:
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)


@contextmanager
def published(stage: Path, folder: Path) -> Iterator[None]:
    """Move what was staged to its target, also when a plugin failed in the block: upstream's own save has worked.

    Not after Ctrl-C: an incomplete save would look complete.

    Raises:
        OSError: it cannot be moved there. The earlier folder is unchanged.
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
    """Clean up what a killed program left next to a folder: put the earlier one back, remove an unfinished save."""
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
    """Do the same for every folder below one."""
    for left in [*folder.rglob(f".*.{_RANDOM}.{_OLD}"), *folder.rglob(f".*.{_RANDOM}.{_NEW}")]:
        settle(left.with_name(left.name[1:].rsplit(".", 2)[0]))


def remove_save(folder: Path) -> None:
    """Remove what trainers and plugins have saved in a folder, and the folder unless something else is in it."""
    for place in (folder / "adapter", folder):
        for name in sorted(_WEIGHTS | _BESIDE_WEIGHTS):
            (place / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            place.rmdir()


def _keep_the_rest(old: Path, folder: Path) -> None:
    """Keep what the new save does not replace: a user's notes, another kind of adapter in the same folder."""
    replaced = {file.parent for file in folder.rglob("*") if file.name in _WEIGHTS}
    for file in sorted(file for file in old.rglob("*") if file.is_file()):
        place = folder / file.relative_to(old)
        if not place.exists() and not (place.parent in replaced and file.name in _WEIGHTS | _BESIDE_WEIGHTS):
            place.parent.mkdir(parents=True, exist_ok=True)
            move(file, place)


def _to_disk(folder: Path) -> None:
    """Wait until every file below a folder is on the disk; otherwise the rename may be written before the content."""
    for place, _, names in os.walk(folder):
        for name in names:
            with (Path(place) / name).open("rb+") as stream:
                os.fsync(stream.fileno())
        _sync_folder(Path(place))


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":
        return  # Windows cannot open folders, and does not need to
    with contextlib.suppress(OSError):  # some file systems do not support it
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
