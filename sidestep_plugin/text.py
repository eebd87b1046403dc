"""Texts from files of strangers, made safe to print."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Final

# What turns the direction of writing round, and so can make a line say something else than it does.
_DIRECTIONS: Final = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def is_control(character: str) -> bool:
    """Whether a character moves the cursor, breaks the line, turns the direction, or is half of one."""
    return unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or character in _DIRECTIONS


def counted(number: object, noun: str) -> str:
    """Such as "1 clip" and "2 clips", "1 process" and "2 processes".

    Args:
        number: a number, or the text of one.
        noun: one of them; a word in front, as in "training step", stays as it is.
    """
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{number} {noun if str(number) == '1' else plural}"


def listed(names: Sequence[str], longest: int = 5) -> str:
    """The first few names, safe to print, and how many there are besides: "a, b and 3 more"."""
    first = ", ".join(shown(name, 80) for name in names[:longest])
    return first + (f" and {len(names) - longest} more" if len(names) > longest else "")


def hours(seconds: float) -> str:
    """A length of time, such as 1:02:03; the rest of a second is left out."""
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def minutes_and_seconds(seconds: float) -> str:
    """The length of a song, such as 3:05; the rest of a second is left out."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def sentence(text: object) -> str:
    """A text as one line that ends like a sentence: with one full stop, whatever somebody else's text ended with."""
    line = " ".join(str(text).split())
    return line if line.endswith(("!", "?")) else line.rstrip(".:;, ") + "."


def shown(value: object, longest: int = 200) -> str:
    """A text, safe to print: control characters as escapes, and not longer than a few lines."""
    text = str(value)
    cut = text[:longest]
    escaped = "".join(
        character.encode("unicode_escape").decode() if is_control(character) else character for character in cut
    )
    return escaped if len(text) <= longest else f"{escaped}... ({len(text)} characters)"
