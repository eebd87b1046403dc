"""Tells one folder of songs from another, for a training that is resumed: did the songs change?

A fingerprint is a text with the way it was made in front. Checkpoints of earlier versions hold another kind, of names
and sizes, without such a word; those are compared in their own way, so that an old checkpoint gives no false alarm.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final

from .dataset import songs_in
from .values import hash_of

_BY_CONTENT: Final = "content-1:"


def fingerprint(folder: Path | None) -> str:
    """A text that tells one folder of songs from another by what the songs hold, in the order in which they are read.

    "" without a folder, or when a song cannot be read.
    """
    if folder is None or not folder.is_dir():
        return ""
    try:
        hashes = [hash_of(file) for file in songs_in(folder)]
    except OSError:
        return ""
    return _BY_CONTENT + hashlib.sha256(repr(hashes).encode()).hexdigest()


def songs_changed(recorded: str, folder: Path | None) -> bool:
    """Whether a folder's songs are others than those of a recorded fingerprint; False when that cannot be told."""
    if ":" not in recorded:
        now = _by_names_and_sizes(folder)
    else:
        now = fingerprint(folder) if recorded.startswith(_BY_CONTENT) else ""
    return bool(recorded and now) and recorded != now


def _by_names_and_sizes(folder: Path | None) -> str:
    """The fingerprint that versions before "content-1" recorded."""
    if folder is None or not folder.is_dir():
        return ""
    try:
        songs = [(file.name, file.stat().st_size) for file in songs_in(folder)]
    except OSError:
        return ""
    return hashlib.sha256(repr(songs).encode()).hexdigest()
