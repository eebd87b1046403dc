"""Writes files so that an interruption leaves the old one or the new one, never half of one; reads small JSON files;
and tells regular files from what only looks like one."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final

MAX_JSON: Final = 2**20
"""Longest JSON file in bytes that is read beside an adapter: what trainers write there takes some kilobytes."""

_TRIES: Final = 20
_PAUSE: Final = 0.05  # seconds


@contextmanager
def replacing(target: Path) -> Iterator[BinaryIO]:
    """Write a file that takes the place of `target` when the block ends, and leaves it alone when the block fails.

    The new file lies in the same folder until then: flushed to the disk and closed before it is renamed, as open or
    as private as the file that it replaces (0644 when there was none).

    Raises:
        OSError: the folder cannot be written, or the disk is full. Nothing of the new file is left.
    """
    import tempfile  # takes long to import, and only those who write need it

    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name[:100]}.", suffix=".tmp")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        # mkstemp makes files for their owner alone. Some file systems have no such thing.
        with contextlib.suppress(PermissionError):
            temporary.chmod(stat.S_IMODE(target.stat().st_mode) if target.exists() else 0o644)
        move(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def move(source: Path, target: Path) -> None:
    """Rename a file over another one, or a folder to a free name, on the same disk.

    On Windows a virus scanner may hold a file that was written just now; it lets go within a moment.
    """
    for attempt in range(_TRIES):
        try:
            source.replace(target)
            return
        except PermissionError:
            if os.name != "nt" or attempt == _TRIES - 1:
                raise
            time.sleep(_PAUSE)


def read_json_object(file: Path) -> dict[str, Any]:
    """Read a small JSON file that holds an object.

    Raises:
        OSError: it is not there or cannot be read.
        ValueError: it is too long, not UTF-8, not JSON, or holds no object. The message is the reason alone.
    """
    with file.open("rb") as stream:
        raw = stream.read(MAX_JSON + 1)
    if len(raw) > MAX_JSON:
        raise ValueError(f"it is longer than {MAX_JSON} bytes")
    try:
        value = json.loads(raw.decode("utf-8-sig"))  # editors on Windows put a byte order mark there
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}, expected an object")
    return value


def is_companion(name: str) -> bool:
    """Whether a file name is that of macOS's companion files, such as ``._model.safetensors``.

    macOS writes them beside files on disks that cannot hold its attributes; they hold nothing else.
    """
    return name.startswith("._")


def not_a_file(path: Path) -> str:
    """What a path is when it is not a regular file or a link to one, "" when it is. The file is not opened."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: no file can have that name
        return f"is a link to {path.readlink()}, which is not there" if path.is_symlink() else "is not there"
    except OSError as error:
        return f"cannot be looked at ({error.strerror})"
    if stat.S_ISREG(mode):
        return ""
    for test, kind in (
        (stat.S_ISDIR, "folder"),
        (stat.S_ISFIFO, "named pipe"),
        (stat.S_ISSOCK, "socket"),
    ):
        if test(mode):
            return f"is a {kind}, not a file"
    return "is a device, not a file"
