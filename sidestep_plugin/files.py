"""Writes files so that an interruption leaves the old file or the new one, never half of one; reads small JSON files.

Only regular files are ever replaced or read. A device, a named pipe, a socket or a directory is refused, and a symbolic
link is followed: the file that it points to is replaced, and the link stays.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import shutil
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final

from .errors import Refusal

MAX_JSON: Final = 2**20
"""Size limit in bytes for a JSON file beside an adapter. Trainers write a few kilobytes there."""

_UNFINISHED: Final = re.compile(r"\..+\.\w{8}\.tmp")

_TRIES: Final = 20
_PAUSE: Final = 0.05  # seconds


@contextmanager
def replacing(target: Path) -> Iterator[BinaryIO]:
    """Write a file that replaces `target` when the block ends. If the block fails, `target` stays as it was.

    Until then the new file lies in the same folder. It is flushed to disk and closed before it is renamed, and gets the
    permissions of the file that it replaces (0644 if there was none). A symbolic link is followed.

    Raises:
        OSError: `target` is not a regular file, the folder is not writable, or the disk is full. Nothing of the new
            file is left.
    """
    import tempfile  # slow to import, and only needed for writing

    target = file_to_replace(target)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name[:100]}.", suffix=".tmp")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        # mkstemp creates files that only their owner can read. Some file systems have no permissions.
        with contextlib.suppress(PermissionError):
            temporary.chmod(stat.S_IMODE(target.stat().st_mode) if target.exists() else 0o644)
        move(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def remove_unfinished(folder: Path) -> None:
    """Remove what :func:`replacing` left in a folder when the program was killed. Nobody may be writing there."""
    for file in folder.glob(".*.tmp"):
        if _UNFINISHED.fullmatch(file.name) and file.is_file():
            with contextlib.suppress(OSError):
                file.unlink()


def file_to_replace(target: Path) -> Path:
    """The file that writing to `target` replaces: `target` itself, or the file that it links to. It need not exist.

    Raises:
        OSError: it is a device, a named pipe, a socket or a directory, or a link that leads back to itself.
    """
    if (kind := special_kind(target)) is not None:
        code = errno.EISDIR if kind == "directory" else errno.EINVAL
        raise OSError(code, f"{target.name} is a {kind}, and only regular files are replaced", str(target))
    # Only a link is resolved: on Windows resolving may turn a drive letter into a network path.
    return Path(os.path.realpath(target)) if target.is_symlink() else target


def special_kind(file: Path) -> str | None:
    """What a path leads to if not to a regular file: "directory", "named pipe", "device" or "socket". Follows links.

    None for a regular file and for a path where there is nothing yet.

    Raises:
        OSError: it cannot be told, for example because a link leads back to itself.
    """
    try:
        mode = file.stat().st_mode
    except FileNotFoundError:
        return None
    if stat.S_ISREG(mode):
        return None
    kinds = {stat.S_IFDIR: "directory", stat.S_IFIFO: "named pipe", stat.S_IFSOCK: "socket"}
    return kinds.get(stat.S_IFMT(mode), "device")


def move(source: Path, target: Path) -> None:
    """Rename a file over another one, or a folder to an unused name, on the same disk.

    On Windows a virus scanner may hold a newly written file open for a moment, so renaming is tried again.
    """
    for attempt in range(_TRIES):
        try:
            source.replace(target)
            return
        except PermissionError:
            if os.name != "nt" or attempt == _TRIES - 1:
                raise
            time.sleep(_PAUSE)


def without_nan(value: Any) -> Any:
    """A value for JSON, which has neither NaN nor infinity: these become null, wherever they are in it."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: without_nan(entry) for key, entry in value.items()}
    return [without_nan(entry) for entry in value] if isinstance(value, list | tuple) else value


def read_json_object(file: Path) -> dict[str, Any]:
    """Read a small JSON file that holds an object.

    Raises:
        OSError: the file is missing or cannot be read.
        ValueError: it is not a regular file, too long, not UTF-8, not JSON, or not an object. The message gives only
            the reason.
    """
    # Opening a named pipe would wait for somebody to write into it. A directory fails by itself.
    if (kind := special_kind(file)) not in (None, "directory"):
        raise ValueError(f"it is a {kind}, not a regular file")
    with file.open("rb") as stream:
        raw = stream.read(MAX_JSON + 1)
    if len(raw) > MAX_JSON:
        raise ValueError(f"it is longer than {MAX_JSON} bytes")
    try:
        value = json.loads(raw.decode("utf-8-sig"))  # some editors on Windows write a byte order mark
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}, expected an object")
    return value


def at_home(name: str) -> str:
    """A path with ``~`` and ``~user`` at its beginning replaced by the home folder.

    Raises:
        Refusal: there is no such user, or no home folder.
    """
    if not name.startswith("~"):
        return name
    try:
        return str(Path(name).expanduser())
    except RuntimeError:
        user = re.split(r"[\\/]", name)[0]
        raise Refusal(f"There is no home folder for {user}. Type the whole path.") from None


def is_companion(name: str) -> bool:
    """Whether a file name is that of macOS's companion files, such as ``._model.safetensors``.

    macOS writes them beside files on disks that cannot hold its attributes; they hold nothing else.
    """
    return name.startswith("._")


_STAND_INS: Final = (
    (b"version https://git-lfs", "is a Git LFS pointer, which only names the file: git lfs pull gets it"),
    (b"<!doctype html", "is a web page: download the file itself, not the page that shows it"),
    (b"<html", "is a web page: download the file itself, not the page that shows it"),
)


def stand_in(file: Path) -> str:
    """What a file holds in place of the one that belongs there, and how to get that; "" if neither is known.

    Its beginning is enough. What is no regular file holds nothing: a named pipe would be waited for.
    """
    if not_a_file(file):
        return ""
    try:
        with file.open("rb") as stream:
            start = stream.read(64)
    except OSError:
        return ""
    if not start:
        return "is empty, as an interrupted download leaves it"
    start = start.lstrip().lower()
    return next((what for sign, what in _STAND_INS if start.startswith(sign)), "")


def not_a_file(path: Path) -> str:
    """What a path is when it is not a regular file or a link to one, "" when it is. The file is not opened."""
    try:
        kind = special_kind(path)
        if kind is None and path.exists():
            return ""
    except (NotADirectoryError, ValueError):  # ValueError: no file can have that name
        kind = None
    except OSError as error:
        return f"cannot be looked at ({error.strerror})"
    if kind is not None:
        return f"is a {'folder' if kind == 'directory' else kind}, not a file"
    return f"is a link to {path.readlink()}, which is not there" if path.is_symlink() else "is not there"


def room(folder: Path) -> str:
    """How much free space the disk of a folder has, as a sentence."""
    place = next((place for place in (folder, *folder.parents) if place.exists()), folder)
    try:
        free = shutil.disk_usage(place).free
    except OSError:
        return f"The free space on the disk of {folder} is not known."
    return f"The disk of {folder} has {free / 2**20:,.0f} MB free."
