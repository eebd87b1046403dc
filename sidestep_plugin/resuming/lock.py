"""One training at a time in an output folder: two would overwrite each other's checkpoints.

The lock is the operating system's own on a hidden file, so it ends with the process that holds it, however that ends. A
file that a killed process left behind locks nothing.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import weakref
from functools import partial
from pathlib import Path
from typing import Final

from ..errors import Refusal

FILE_NAME: Final = ".training_lock"

_BUSY: Final = frozenset({errno.EACCES, errno.EAGAIN, errno.EWOULDBLOCK, getattr(errno, "EDEADLK", errno.EAGAIN)})
_LOCKED_BYTE: Final = 2**30
"""Windows locks bytes, and nobody may read those; this one lies behind everything that is written."""


class OutputLock:
    """The lock of one output folder; releasing it twice, or without having it, does nothing.

    Attributes:
        folder: the output folder.
        warning: why the folder could not be locked; None when it could, or when nobody has tried yet.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.warning: str | None = None
        self._release: weakref.finalize[[int, Path, list[Path]], OutputLock] | None = None

    def acquire(self) -> None:
        """Lock the folder, which is made if it is not there.

        A file system without locks is no reason not to train: then :attr:`warning` says so.

        Raises:
            Refusal: another training holds the lock.
        """
        made: list[Path] = []
        try:
            for place in reversed([place for place in (self.folder, *self.folder.parents) if not place.exists()]):
                place.mkdir(exist_ok=True)
                made.append(place)
            descriptor = _locked(self.folder / FILE_NAME)
        except BlockingIOError:
            raise Refusal(
                f"Another training is running in {self.folder} ({_holder(self.folder / FILE_NAME)}). Choose "
                "another --output-dir, or wait until that training has ended."
            ) from None
        except OSError as error:
            self.warning = (
                f"Warning: {self.folder} could not be locked ({error.strerror or error}). Start no second training "
                "with this output folder."
            )
            return
        self._release = weakref.finalize(self, _unlock, descriptor, self.folder / FILE_NAME, made)
        _held.add(self)

    def release(self) -> None:
        """Unlock the folder; the lock file, and folders that were made for it and are still empty, are removed."""
        _held.discard(self)
        if self._release is not None:
            self._release()

    def __enter__(self) -> OutputLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _forget(self) -> None:
        """Leave the lock to the parent process: a loader's worker that outlives it must not keep the folder locked."""
        if self._release is not None and (kept := self._release.detach()) is not None:
            os.close(kept[2][0])


_held: Final[weakref.WeakSet[OutputLock]] = weakref.WeakSet()


def _forget_all() -> None:
    for lock in list(_held):
        lock._forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)


def _locked(file: Path) -> int:
    """Open a file and lock it | returns its descriptor.

    Raises:
        BlockingIOError: somebody else holds the lock.
        OSError: the file cannot be opened, or its file system knows no locks.
    """
    while True:
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        except PermissionError:  # another user's process was killed and left it
            descriptor = os.open(file, os.O_RDONLY)
        try:
            _lock(descriptor)
            # The one before us removes the file when it is done, perhaps after we opened it.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), file.stat()):
                    _sign(descriptor)
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(descriptor: int) -> None:
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _BUSY:
            raise BlockingIOError from error
        raise


def _unlock(descriptor: int, file: Path, made: list[Path]) -> None:
    steps = (file.unlink, partial(os.close, descriptor))
    for step in reversed(steps) if os.name == "nt" else steps:  # there, a file that is open cannot be removed
        with contextlib.suppress(OSError):
            step()
    with contextlib.suppress(OSError):  # whatever is not empty stays
        for place in reversed(made):
            place.rmdir()


def _sign(descriptor: int) -> None:
    """Write down who holds the lock, for the message that another training gets."""
    import platform

    with contextlib.suppress(OSError):  # a full disk, or another user's file: the lock holds all the same
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, json.dumps({"pid": os.getpid(), "host": platform.node()}).encode("utf-8"))


def _holder(file: Path) -> str:
    try:
        signed = json.loads(file.read_text(encoding="utf-8"))
        return f"process {int(signed['pid'])} on {signed['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "its process is unknown"
