"""How much memory a program may still use, as far as the system says: by psutil, which PEFT brings along."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

_MEMINFO: Final = Path("/proc/meminfo")
_MEMBERSHIP: Final = Path("/proc/self/cgroup")
_GROUPS: Final = Path("/sys/fs/cgroup")


def free_memory() -> int | None:
    """Bytes of RAM that can be had without swapping; None if unknown.

    In a container or a batch job it is what the job's own limit leaves, if that is less.
    """
    known = [number for number in (_of_the_system(), *_of_the_job()) if number is not None]
    return max(0, min(known)) if known else None


def _of_the_system() -> int | None:
    with suppress(ImportError):
        import psutil

        return int(psutil.virtual_memory().available)
    with suppress(OSError, ValueError, IndexError):
        for line in _MEMINFO.read_text(encoding="ascii", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name == "MemAvailable":
                return 1024 * int(value.split()[0])
    with suppress(AttributeError, OSError, ValueError):  # Windows has no such function, and macOS does not say
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _of_the_job() -> Iterator[int]:
    """What the limits of the control groups (version 2) leave that this process is in."""
    try:
        entries = _MEMBERSHIP.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    inner = next((entry.removeprefix("0::/") for entry in entries if entry.startswith("0::/")), None)
    if inner is None:
        return
    folder = _GROUPS / inner
    for group in (folder, *folder.parents):
        if group == _GROUPS.parent:
            return
        try:
            limit = int((group / "memory.max").read_text(encoding="ascii"))  # "max" where there is none
            used = int((group / "memory.current").read_text(encoding="ascii"))
            kept = (group / "memory.stat").read_text(encoding="ascii").split()
            # Files that were read and can be dropped count as used there.
            yield limit - used + int(kept[kept.index("inactive_file") + 1])
        except (OSError, ValueError):
            continue
