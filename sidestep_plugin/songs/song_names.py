"""Names of prepared songs: from the path of the audio, the same in every run and on every system.

``rock/01 Song.wav`` becomes ``rock__01 Song``. No random number and no order of reading goes into a name, so running
again finds what is already there.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath
from typing import Final

# What Windows does not take in a name, or takes only for a device.
_NOT_IN_NAMES: Final = re.compile(r'[<>:"/\\|?*\x00-\x1f\x7f]')
_DEVICES: Final = frozenset(
    {"con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in "0123456789¹²³")}
)
_LONGEST: Final = 120  # bytes of UTF-8: file systems take 255, and unfinished files get something in front and behind


def song_names(folder: Path, audio: Iterable[Path]) -> Mapping[Path, str]:
    """A name for each song, without ending, told from a folder; a file outside of it is named by its own name.

    No two names are equal, also where small and capital letters are the same. Files whose names would be equal
    (``song.wav`` and ``song.mp3``) all get their ending (``song_wav``), or a hash of their path.
    """
    files = list(dict.fromkeys(audio))
    level = dict.fromkeys(files, 0)
    while True:
        names = {file: _name(told_from(folder, file), level[file]) for file in files}
        count = Counter(folded(name) for name in names.values())
        clashing = [file for file in files if count[folded(names[file])] > 1 and level[file] < 2]
        if not clashing:
            return names
        for file in clashing:
            level[file] += 1


def told_from(folder: Path, file: Path) -> PurePath:
    """A file's path from a folder; its name alone where it lies elsewhere."""
    try:
        return file.relative_to(folder)
    except ValueError:
        return PurePath(file.name)


def _name(path: PurePath, level: int) -> str:
    parts = [*path.parts[:-1], path.stem]
    if level == 1 and path.suffix:
        parts[-1] += f"_{path.suffix[1:].lower()}"
    # Half a character (a name that is no UTF-8) becomes "?", and that "_".
    whole = [unicodedata.normalize("NFC", part).encode("utf-8", "replace").decode() for part in parts]
    name = "__".join(_NOT_IN_NAMES.sub("_", part) for part in whole).strip(". ") or "_"
    if name.split(".")[0].rstrip().lower() in _DEVICES:
        name = f"_{name}"
    digest = hashlib.sha256(path.as_posix().encode("utf-8", "surrogateescape")).hexdigest()[:8]
    if len(name.encode()) > _LONGEST:
        name, level = name.encode()[: _LONGEST - 9].decode(errors="ignore").rstrip(". "), 2
    return f"{name}_{digest}" if level == 2 else name


def folded(name: str) -> str:
    """A name without differences of capitals and of composed letters."""
    return unicodedata.normalize("NFC", name).casefold()
