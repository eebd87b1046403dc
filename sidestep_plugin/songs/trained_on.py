"""Which songs a training was trained on: beginnings of their files' hashes, kept in its report and nowhere else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from ..files import read_json_object
from .values import hash_of

ENTRY: Final = "trained_songs"
"""Name in the report of a training."""

_REPORT: Final = "training_report.json"
_LENGTH: Final = 16


def hashes_of(songs: Iterable[Path]) -> list[str]:
    """What the report keeps of the songs that are trained on; a song that cannot be read is left out."""
    found = []
    for song in songs:
        try:
            found.append(hash_of(song)[:_LENGTH])
        except OSError:
            continue
    return found


def trained_on(weights: Path, songs: Sequence[Path]) -> int:
    """How many of the songs an adapter was trained on, by the report of its training.

    Args:
        weights: the adapter's weights file.
        songs: files of songs.

    Returns:
        0 where there is no report, or one that does not say it.
    """
    for folder in list(weights.absolute().parents)[:4]:
        try:
            known = read_json_object(folder / _REPORT)[ENTRY]
        except (OSError, ValueError, LookupError):
            continue
        return len(set(known) & set(hashes_of(songs))) if isinstance(known, list) else 0
    return 0
