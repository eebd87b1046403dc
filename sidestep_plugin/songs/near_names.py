"""Which name a file was perhaps meant to have that belongs to no song."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection
from typing import Final

ENDINGS: Final = (".caption.txt", ".lyrics.txt", ".txt", ".json")
"""What stands behind a song's name in the files that belong to it."""

OTHERS: Final = (".lyrics", ".lyric", ".lrc", ".caption", ".captions", ".text", ".md")
"""Endings of other files that may be meant as such."""

_MEANT: Final = (
    (re.compile(r"lyric|\.lrc$"), ".lyrics.txt"),
    (re.compile(r"capt|prompt|descr"), ".caption.txt"),
    (re.compile(r"^\.\w{2,4}\.txt$|^\.text$|^\.md$"), ".txt"),
    (re.compile(r"^\.\w{2,4}\.json$"), ".json"),
)
_CLOSE: Final = 0.85
"""How alike two names have to be, 1 for the same."""

_TYPED: Final = 2  # letters too many or too few


def expected(name: str, songs: Collection[str], there: Collection[str]) -> str | None:
    """The name that was expected of a file.

    Args:
        name: the file's name.
        songs: names of the songs beside it, without their endings.
        there: names of all files beside it, which are not expected any more.

    Returns:
        A name; None if none is near.
    """
    small, taken = name.casefold(), {other.casefold() for other in there}
    wanted = {f"{song}{ending}".casefold(): f"{song}{ending}" for song in songs for ending in ENDINGS}
    free = [each for each in wanted if each not in taken]
    for song in sorted(songs, key=len, reverse=True):
        rest = small.removeprefix(song.casefold())
        if rest != small and (rest[:1] in "._- (" or not rest):
            ending = next((ending for meant, ending in _MEANT if meant.search(rest)), "")
            if (full := f"{song}{ending}".casefold()) in free:
                return wanted[full]
    for near in difflib.get_close_matches(small, free, n=3, cutoff=_CLOSE):
        other_song = _without_numbers(near) == _without_numbers(small) or abs(len(near) - len(small)) > _TYPED
        if not other_song:
            return wanted[near]
    return None


def _without_numbers(name: str) -> str:
    return re.sub(r"[\W_]*\d+", "", name)
