"""Finds the weights file that a path means: the file itself, or the one in the folder of an adapter or a training."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from ..errors import Refusal
from .kinds import WEIGHT_NAMES

_FOLDERS: Final = ("", "adapter", "final", "final/adapter")
_COPY: Final = re.compile(r"comfyui_.*\.safetensors")


def find_weights(path: Path) -> Path:
    """The weights file that a path means: the path itself, or the file in the folder of an adapter or a training.

    Raises Refusal if there is none, more than one, only a pickle, or a link out of the folder.
    """
    if path.is_dir():
        found = [
            path / folder / name
            for folder in _FOLDERS
            for name in WEIGHT_NAMES
            if (path / folder / name).is_file() or (path / folder / name).is_symlink()
        ]
        found = [file for file in found if file.parent == found[0].parent] or _others_in(path)
        if len(found) != 1:
            raise _not_one(path, found)
        check_inside(found[0], path)
        return found[0]
    if not path.exists():
        raise Refusal(f"No adapter at {path}. Expected a .safetensors file or the folder of an adapter.")
    if not path.is_file() and not path.is_symlink():
        raise Refusal(
            f"{path} is neither a file nor a folder. Expected a .safetensors file or the folder of an adapter."
        )
    check_inside(path, path.parent)
    return path


def check_inside(file: Path, folder: Path) -> None:
    """Refuse a file that is a link out of the folder. Raises Refusal."""
    try:
        real = file.resolve(strict=True)
        inside = real.is_relative_to(folder.resolve(strict=True))
    except (OSError, RuntimeError):  # a link to nowhere, or to itself
        raise Refusal(f"{file} is a broken link. Put the file itself there.") from None
    if not inside:
        raise Refusal(f"{file} is a link out of its folder, to {real}, and was not read. Name that file itself.")
    if not real.is_file():
        raise Refusal(f"{file} is neither a file nor a link to one. Put the file itself there.")


def _others_in(folder: Path) -> list[Path]:
    files = (file for file in folder.glob("*.safetensors") if not file.name.startswith("."))
    return sorted(file for file in files if not _COPY.fullmatch(file.name))


def has_neighbours_of_its_own(weights: Path) -> bool:
    """Whether the JSON files in the folder belong to this weights file. If there are several, that is not certain."""
    folder = weights.absolute().parent
    return weights.name in WEIGHT_NAMES or _others_in(folder) == [folder / weights.name]


def _not_one(folder: Path, found: list[Path]) -> Refusal:
    if found:
        names = ", ".join(file.name for file in found[:5])
        return Refusal(f"{folder} has {len(found)} weights files ({names}). Name one of them.")
    below = sorted(
        file.parent.relative_to(folder)
        for name in WEIGHT_NAMES
        for depth in ("*", "*/*", "*/*/*")
        for file in folder.glob(f"{depth}/{name}")
    )
    if below:
        names = ", ".join(str(place) for place in below[:5]) + (", ..." if len(below) > 5 else "")
        if len(below) == 1:
            return Refusal(f"{folder} is not an adapter itself but contains one: {names}. Name that folder.")
        return Refusal(
            f"{folder} is not an adapter itself but contains {len(below)}: {names}. Name one of these folders."
        )
    pickles = sorted(file.name for suffix in ("bin", "pt", "pth", "ckpt") for file in folder.glob(f"*.{suffix}"))
    if pickles:
        return Refusal(
            f"{folder} has no .safetensors file, only {pickles[0]}. That is a pickle file, which could run code, so it "
            "was not opened. Save the adapter as safetensors."
        )
    return Refusal(f"No adapter in {folder}. Expected {' or '.join(WEIGHT_NAMES)} in it.")
