"""What a finished training has left behind, for the last lines on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import read_json_object
from .page import FILE_NAME, is_ours
from .plugin import FILE_NAME as REPORT


def best_line(output: Path, final: Mapping[str, Any]) -> str | None:
    """Which epoch of a training was the best, where its adapter is, and how it compares with the finished one.

    Args:
        output: the output folder.
        final: the facts that were saved with the finished adapter.

    Returns:
        A line; None for a training that has not validated.
    """
    try:
        validation = read_json_object(output / REPORT)["validation"]
        best = int(validation["best_epoch"])
        variant = validation.get("best_variant")
        entry = next(entry for entry in validation["epochs"] if entry["epoch"] == best)
        change = float((entry["variants"][variant] if variant else entry)["change"])
    except (OSError, ValueError, TypeError, LookupError, StopIteration):
        return None
    place = best_place(output)
    which = f" ({variant})" if variant else ""
    told = f"Best epoch: {best}{which}, validation loss {100 * change:+.2f} % vs. no adapter"
    told += f", in {place}" if place is not None else ""
    if final.get("validation_epoch") == best and not variant:
        return f"{told}; final is the same"
    if isinstance(other := final.get("validation_change"), float):
        return f"{told}; final: {100 * other:+.2f} %"
    return f"{told}; final was not validated"


def best_place(output: Path) -> Path | None:
    """The folder with the best adapter of a training, as its report says; None if its adapter is in no checkpoint.

    ``checkpoints/best`` itself may hold another epoch's: the training has looked, and found out if it could be saved.
    """
    try:
        place = read_json_object(output / REPORT)["validation"]["best_in"]
    except (OSError, ValueError, TypeError, LookupError):
        return None
    return output / place if isinstance(place, str) and (output / place).is_dir() else None


def page_in(output: Path) -> Path | None:
    """The page of the training in an output folder; None if there is none."""
    file = output / FILE_NAME
    return file if file.is_file() and is_ours(file) else None
