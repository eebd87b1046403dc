"""Which songs a training was trained on: did a folder's songs change, and which does its report name?

A folder's fingerprint is a text with the way it was made in front. Checkpoints of earlier versions hold another kind,
of names and sizes, without such a word; those are compared in their own way, so that an old one gives no false alarm.
The report keeps the beginnings of the songs' hashes, which nothing else does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final

from ..files import read_json_object
from .dataset import songs_in
from .values import hash_of

_BY_CONTENT: Final = "content-1:"
ENTRY: Final = "trained_songs"  # name in the report of a training

_REPORT: Final = "training_report.json"
_LENGTH: Final = 16


def fingerprint(folder: Path | None) -> str:
    """A text that tells one folder of songs from another by what the songs hold, in the order in which they are read.

    "" without a folder, or when a song cannot be read.
    """
    told = _hash(folder, hash_of)
    return _BY_CONTENT + told if told else ""


def songs_changed(recorded: str, folder: Path | None) -> bool:
    """Whether a folder's songs are others than those of a recorded fingerprint; False when that cannot be told."""
    if ":" not in recorded:  # as versions before "content-1" recorded it
        now = _hash(folder, lambda file: (file.name, file.stat().st_size))
    else:
        now = fingerprint(folder) if recorded.startswith(_BY_CONTENT) else ""
    return bool(recorded and now) and recorded != now


def _hash(folder: Path | None, told: Callable[[Path], object]) -> str:
    """A hash of what is told of each song of a folder; "" without a folder, or when a song cannot be read."""
    if folder is None or not folder.is_dir():
        return ""
    try:
        songs = [told(file) for file in songs_in(folder)]
    except OSError:
        return ""
    return hashlib.sha256(repr(songs).encode()).hexdigest()


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
    """How many of the songs the adapter in a weights file was trained on; 0 where no report of its training says it."""
    for folder in list(weights.absolute().parents)[:4]:
        try:
            known = read_json_object(folder / _REPORT)[ENTRY]
        except (OSError, ValueError, LookupError):
            continue
        return len(set(known) & set(hashes_of(songs))) if isinstance(known, list) else 0
    return 0
