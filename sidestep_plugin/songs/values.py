"""Reads every value of every song once: what is not finite (NaN or infinity), and a hash of each file.

One NaN in one song turns a step's loss into NaN, and upstream goes on. What was read is remembered by path, size and
times of the file, so that later questions in the same process cost no second reading.
"""

from __future__ import annotations

import errno
import hashlib
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ..errors import Refusal
from ..files import special_kind
from .one_song import MASK_OF, SONG_TENSORS, load_song

if TYPE_CHECKING:
    import torch

_PATIENCE: Final = 2.0  # seconds of silence before a line of progress, and then between the lines
_BETWEEN: Final = 15.0
_LONGEST_LIST: Final = 5  # songs, and ranges of rows

Key = tuple[str, int, int, int]
_hashes: dict[Key, str] = {}
_not_finite: dict[Key, tuple[NotFinite, ...]] = {}


@dataclass(frozen=True)
class NotFinite:
    """Values of a song's tensor that are not finite: in which rows, from 0, and whether the mask hides all of these."""

    file: Path
    tensor: str
    rows: tuple[int, ...]
    hidden: bool

    def __str__(self) -> str:
        return f"{self.tensor} {_ranges(self.rows)}"


def check_values(files: Sequence[Path], *, mask_nan: bool, say: Callable[[str], None] | None = None) -> int:
    """Refuse songs with values that are not finite. Raises Refusal, which names the songs, tensors and rows.

    With `mask_nan`, such values are set to zero for the training in rows that the mask hides; returned is the number of
    songs with such values, else 0. `say` takes a line of progress when the reading takes longer than a few seconds.
    """
    by_song = [found for found in _read_all(files, say) if found]
    hidden = [found for found in by_song if all(tensor.hidden for tensor in found)]
    visible = [found for found in by_song if not all(tensor.hidden for tensor in found)]
    refused = []
    if visible:
        refused.append(f"{_listed(visible)}. Preprocess them again, or take them out of the folder")
    if hidden and not mask_nan:
        refused.append(
            f"only in rows that the mask hides: {_listed(hidden)}. Preprocess these again, or set those values to zero "
            "for this training: --mask-nan (the files stay as they are)"
        )
    if refused:
        raise Refusal(f"Songs with values that are not finite (NaN or infinity), expected none: {'; '.join(refused)}.")
    return len(hidden)


def hash_of(file: Path) -> str:
    """SHA-256 of a file's bytes. Raises OSError."""
    key = key_of(file)
    if key not in _hashes:
        if kind := special_kind(file):  # a named pipe would be waited for
            raise OSError(errno.EINVAL, f"it is a {kind}", str(file))
        with file.open("rb") as stream:
            _hashes[key] = hashlib.file_digest(stream, "sha256").hexdigest()
    return _hashes[key]


def not_finite_in(file: Path) -> tuple[NotFinite, ...]:
    """The tensors of a song with values that are not finite; () for a file that is no song, too. Raises OSError."""
    key = key_of(file)
    if key not in _not_finite:
        try:
            song = load_song(file)
            _not_finite[key] = tuple(_look(file, {name: song[name] for name in SONG_TENSORS}))
        except Exception:  # no song: another check says so
            _not_finite[key] = ()
    return _not_finite[key]


def _read_all(files: Sequence[Path], say: Callable[[str], None] | None) -> Iterable[tuple[NotFinite, ...]]:
    silent_until = time.monotonic() + _PATIENCE
    songs = list(dict.fromkeys(files))
    for done, file in enumerate(songs):
        if say is not None and time.monotonic() >= silent_until:
            say(f"Checking the values of the songs: {done} of {len(songs)} ...")
            silent_until = time.monotonic() + _BETWEEN
        hash_of(file)  # now, while the file is in memory anyway: resuming compares songs by their contents
        yield not_finite_in(file)


def _look(file: Path, song: dict[str, torch.Tensor]) -> Iterable[NotFinite]:
    for name, tensor in song.items():
        if not tensor.is_floating_point() or _all_finite(tensor):
            continue
        bad = (~tensor.isfinite()).flatten(1).any(1) if tensor.dim() > 1 else ~tensor.isfinite()
        rows = bad.nonzero().flatten().tolist()
        mask = song.get(MASK_OF.get(name, ""))
        hidden = mask is not None and not bool((mask[bad] != 0).any())
        yield NotFinite(file, name, tuple(rows), hidden)


def _all_finite(tensor: torch.Tensor) -> bool:
    """Whether all values are finite. A sum is NaN or infinite when one of its terms is, and cheap to compute."""
    import torch

    wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return math.isfinite(tensor.sum(dtype=wide).item()) or bool(tensor.isfinite().all())


def key_of(file: Path) -> Key:
    """What a file is remembered by: its path, size and times. Raises OSError."""
    found = file.stat()
    return str(file.absolute()), found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _listed(songs: Sequence[tuple[NotFinite, ...]]) -> str:
    shown = [f"{found[0].file.name} ({', '.join(map(str, found))})" for found in songs[:_LONGEST_LIST]]
    return _and_more(shown, len(songs))


def _ranges(rows: Sequence[int]) -> str:
    """Numbers of rows as ranges: "row 3", "rows 3-5, 9", "rows 1, 3, 5, 7, 9 and 12 more"."""
    ranges: list[list[int]] = []
    for row in rows:
        if ranges and row == ranges[-1][1] + 1:
            ranges[-1][1] = row
        else:
            ranges.append([row, row])
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in ranges[:_LONGEST_LIST]]
    return f"{'row' if len(rows) == 1 else 'rows'} {_and_more(texts, len(ranges))}"


def _and_more(shown: Sequence[str], count: int) -> str:
    rest = count - len(shown)
    return ", ".join(shown) + (f" and {rest} more" if rest else "")
