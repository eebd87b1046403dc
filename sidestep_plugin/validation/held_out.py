"""Which songs are held out for validation, and that none of them is trained on as well.

They are chosen by a hash of their names: no random number is drawn, and it is the same songs in every run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from ..engine.song_files import hash_of_tensor
from ..errors import Refusal
from ..songs.one_song import load_song
from ..songs.values import Key, key_of
from ..text import counted

_latents: dict[Key, str] = {}


def choose(songs: Sequence[Path], count: int) -> tuple[Path, ...]:
    """Choose `count` songs to hold out, in their order: the same for the same names, wherever the folder is."""

    def rank(song: Path) -> tuple[str, str]:
        return hashlib.sha256(song.name.encode("utf-8", "surrogateescape")).hexdigest(), str(song)

    chosen = set(sorted(songs, key=rank)[:count])
    return tuple(song for song in songs if song in chosen)


def number_of(said: float, songs: int) -> int:
    """How many songs to hold out: a whole number, or a share below 1, but at least one. Raises Refusal for all."""
    count = max(1, round(said * songs)) if said < 1.0 else int(said)
    if count >= songs:
        raise Refusal(
            f"--validate {said:g} would hold out {count} of {counted(songs, 'song')}, and none would be left to "
            "train on. Choose fewer, or validate on songs of another folder: --validation-dir DIR."
        )
    return count


def check_apart(trained: Sequence[Path], held_out: Sequence[Path]) -> None:
    """Refuse a song that would be trained on and validated on, also under two names (same latents). Raises Refusal."""
    known = {latents_of(song): song for song in trained}
    for song in held_out:
        if (twin := known.get(latents_of(song))) is not None:
            raise Refusal(
                f"{song} is held out for validation, and {twin} that is trained on is the same song (same latents). "
                "Its loss would fall in any case and say nothing. Take one of them out of its folder."
            )


def latents_of(file: Path) -> str:
    """SHA-256 of a song's latents; of a file that is no song, its name. Remembered by path, size and times."""
    key = key_of(file)
    if key not in _latents:
        try:
            _latents[key] = hash_of_tensor(load_song(file)["target_latents"])
        except Exception:  # no song: another check says so
            _latents[key] = str(file)
    return _latents[key]
