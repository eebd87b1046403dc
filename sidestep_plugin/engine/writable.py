"""Whether adapters can be saved in a folder, found out before anything is trained or generated."""

from __future__ import annotations

import tempfile
from pathlib import Path

from ..errors import Refusal
from ..text import shown
from .shapes import FINAL, INTERRUPTED


def check_writable(folder: Path) -> None:
    """Refuse a folder that cannot be written, by trying it and leaving no trace. Raises Refusal."""
    check_name(folder)
    made: list[Path] = []
    try:
        for place in reversed([place for place in (folder, *folder.parents) if not place.exists()]):
            place.mkdir()
            made.append(place)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise Refusal(f"Cannot write to {folder}: {error.strerror or error}. Choose another folder.") from None
    finally:
        for place in reversed(made):
            place.rmdir()
    for place in (folder / FINAL, folder / "checkpoints", folder / INTERRUPTED):
        if place.exists() and not place.is_dir():  # it would fail only when the adapter is saved
            raise Refusal(f"{place} is not a folder, but adapters are saved there. Choose another folder.")


def check_name(folder: Path) -> None:
    """Refuse a folder whose name is not text: safetensors, which saves the adapter, cannot open it. Raises Refusal."""
    try:
        str(folder).encode("utf-8")
    except UnicodeEncodeError:
        raise Refusal(
            f"The name of the folder {shown(folder)} is not UTF-8, so no adapter can be saved in it. Choose another "
            "folder, or rename it."
        ) from None
