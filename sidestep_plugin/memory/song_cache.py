"""Keeps songs in RAM after they were read once (``--song-cache``): ACE-Step reads each song's file in every epoch."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click

from ..engine.answers import counted, writes
from ..hookspecs import hookimpl
from ..options import option
from ..run import Run
from .free_memory import free_memory

SHARE: Final = 0.5
"""Share of the free memory that the songs may take with ``auto``."""

_UNITS: Final = {
    letter + unit: base**power
    for power, letter in enumerate("kmgt", start=1)
    for unit, base in (("", 1024), ("b", 1000), ("ib", 1024))
}

_KEY: Final = "sidestep.song_cache"


class CacheSize(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # generic from click 8.4 on
    """``auto``, ``off`` or a size with its unit, such as ``4GB`` or ``1.5 GiB``."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = value.strip() if isinstance(value, str) else ""
        if text.lower() not in ("auto", "off") and not _bytes_in(text):
            self.fail(f"{value!r}: expected auto, off or a size such as 4GB.", param, ctx)
        return text.lower() if text.lower() in ("auto", "off") else text


@hookimpl
def acestep_options() -> list[click.Option]:
    return [option("--song-cache", "RAM for songs: auto, off, or a size such as 4GB.", CacheSize(), "SIZE", "auto")]


@hookimpl
def acestep_run_started(run: Run) -> list[str]:
    """Decide how much RAM the songs may take, and say it in one line where songs are kept."""
    wanted = run.options["song_cache"]
    songs = [] if run.engine is None else run.engine.songs
    if wanted == "off" or not songs:
        return []
    if getattr(run.training_config, "max_epochs", None) == 1:  # nothing is gained by keeping what is read once
        note = f"Note: --song-cache {wanted} has no effect: in one epoch each song is read once."
        return [] if wanted == "auto" else [note]
    if workers := getattr(run.training_config, "num_workers", 0):
        return [f"Note: songs are not kept in RAM, because {workers} processes read them (--num-workers 0 keeps them)."]
    free = free_memory()
    if wanted == "auto" and free is None:
        return [
            "Note: songs are not kept in RAM, because this system does not say how much is free (--song-cache 4GB)."
        ]
    allowed = int(SHARE * (free or 0)) if wanted == "auto" else _bytes_in(wanted)
    size = sum(file.stat().st_size for file in set(songs))
    cache = run.state[_KEY] = SongCache(allowed)
    run.engine.at_end(cache.clear)
    lines = []
    if free is not None and min(allowed, size) > free:
        lines = [f"Warning: --song-cache {wanted} is more than the free memory ({_shown(free)}). Choose less."]
    if size <= allowed:
        return [*lines, f"Songs: kept in RAM after the first epoch ({_shown(size)}; same result, bit for bit)"]
    share = f"{_shown(allowed)} of {_shown(size)}"
    return [*lines, f"Songs: {share} kept in RAM after the first epoch (same result, bit for bit)"]


@hookimpl
def engine_read_song(run: Run, file: str, read: Callable[[], Any]) -> Any:
    cache: SongCache | None = run.state.get(_KEY)
    return None if cache is None else cache.read(file, read)


def _bytes_in(text: str) -> int:
    """The bytes that a size with a unit means; 0 for anything else."""
    found = re.fullmatch(r"(\d{1,12}(?:\.\d{1,6})?)\s*([a-z]{1,3})", text.lower())
    return int(float(found[1]) * _UNITS[found[2]]) if found and found[2] in _UNITS else 0


def _shown(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"


@dataclass(frozen=True)
class _Kept:
    """A song in RAM: what upstream read, the state of its file, and how often its tensors had been written to."""

    song: dict[str, Any]
    state: tuple[int, int]
    written: list[int]


class SongCache:
    """Decoded songs by file, up to a number of bytes. Draws no random number and changes no order.

    Songs are kept in the order in which they are first read, until the room is used up; the others are read each time.
    A song whose file has another size or modification time is read again.

    Args:
        room: bytes that the songs may take together.
    """

    def __init__(self, room: int) -> None:
        self.room = room
        self._kept: dict[str, _Kept] = {}

    def read(self, file: str | None, read: Callable[[], Any]) -> Any:
        """A song, from RAM if it is there unchanged. Each caller has a mapping and metadata of its own.

        Args:
            file: the song's file; None where it has none of its own.
            read: reads the song as upstream does.
        """
        state = None if file is None else _state_of(file)
        if file is None or state is None:
            return read()
        kept = self._kept.get(file)
        # A tensor that somebody wrote to is not what is in the file any more.
        if kept is not None and (kept.state, kept.written) == (state, writes(counted(kept.song))):
            return _handed_out(kept.song)
        if kept is not None:
            self.room += _size(kept.song)
            del self._kept[file]
        song = read()
        size = _size(song) if isinstance(song, dict) else self.room + 1
        if size > self.room:
            return song
        self.room -= size
        self._kept[file] = _Kept(song, state, writes(counted(song)))
        return _handed_out(song)

    def clear(self) -> None:
        """Give the memory back; nothing is kept any more."""
        self._kept.clear()
        self.room = 0


def _state_of(file: str) -> tuple[int, int] | None:
    try:
        found = os.stat(Path(file))  # noqa: PTH116
    except (OSError, ValueError):  # upstream says what is wrong when it reads the file
        return None
    return found.st_size, found.st_mtime_ns


def _handed_out(song: Mapping[str, Any]) -> dict[str, Any]:
    """The same tensors, which upstream stacks into new ones, and a copy of everything else."""
    return {name: value if hasattr(value, "_version") else copy.deepcopy(value) for name, value in song.items()}


def _size(song: Mapping[str, Any]) -> int:
    """Bytes of memory that a song's tensors keep."""
    storages = [value.untyped_storage() for value in song.values() if hasattr(value, "untyped_storage")]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
