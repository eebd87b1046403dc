"""How much memory a program may still use: by psutil, which PEFT brings along, and by the limits of a batch job."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

_MEMBERSHIP: Final = Path("/proc/self/cgroup")
_GROUPS: Final = Path("/sys/fs/cgroup")


def free_memory() -> int | None:
    """Bytes of RAM that can be had without swapping; None if unknown.

    In a container or a batch job it is what the job's own limit leaves, if that is less.
    """
    known = list(_of_the_job())
    with suppress(ImportError):
        import psutil

        known.append(int(psutil.virtual_memory().available))
    return max(0, min(known)) if known else None


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
