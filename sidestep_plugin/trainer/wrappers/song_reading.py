"""Reading a song: keeps decoded songs in RAM, as many as plugins allow, and hands out what upstream would have read."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from ...errors import PluginError, Refusal
from ..answers import counted, described, writes
from ..current import running_training

if TYPE_CHECKING:
    from ...run import Run
    from ..host import Host


def wrap_song_reading(host: Host, original: Callable[..., Any]) -> Callable[..., Any]:
    """Upstream's ``PreprocessedTensorDataset.__getitem__`` with a cache for each training."""
    import torch

    caches: WeakKeyDictionary[Run, SongCache] = WeakKeyDictionary()

    @wraps(original)
    def __getitem__(self: Any, index: Any) -> Any:
        training = running_training.get()
        # Every worker process would keep a copy of its own.
        if training is None or torch.utils.data.get_worker_info() is not None:
            return original(self, index)
        cache = caches.get(training.run)
        if cache is None:
            try:
                cache = caches[training.run] = SongCache(_allowed(host, training.run))
            except Refusal as refusal:  # upstream reports it as a failure
                host.refusal = refusal
                raise
            training.at_end.append(cache.clear)
        return cache.read(_file_of(self, index), lambda: original(self, index))

    return __getitem__


def _allowed(host: Host, run: Run) -> int:
    """The smallest number of bytes that a plugin allows; 0 if none allows any. Raises PluginError."""
    allowed = []
    for plugin, size in host.registry.call("acestep_song_cache", run=run):
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise PluginError(
                f"Plugin {plugin!r} returned {size if isinstance(size, int) else described(size)} from "
                "acestep_song_cache, expected a number of bytes, 0 or more."
            )
        allowed.append(size)
    return min(allowed, default=0)


def _file_of(dataset: Any, index: Any) -> str | None:
    """The file of a song; None in versions of upstream that keep several songs in one file."""
    references = getattr(dataset, "sample_refs", None)
    if references:
        reference = references[index]
        return str(reference["path"]) if reference.get("type") == "file" else None
    paths = getattr(dataset, "valid_paths", None)
    return str(paths[index]) if isinstance(paths, list) else None


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
            file: the song's file; None for one that is not kept.
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
    return sum(dict(_storages(song)).values())


def _storages(song: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    for value in song.values():
        if hasattr(value, "untyped_storage"):
            storage = value.untyped_storage()
            yield storage.data_ptr(), storage.nbytes()
