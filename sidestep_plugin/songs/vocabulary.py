"""Brings what people type about a song into the words that the model was trained with.

Upstream hands these values to the model as they are typed, in preprocessing and in generation. The lists are those of
upstream's constants (2026-05-01). Each function returns a `Word`: what the model will be told, and whether the model
knows it. Nothing is guessed: a value that cannot be read with certainty stays as it was typed.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Final

BPM_RANGE: Final = (30, 300)  # beats per minute that the model knows

TIME_SIGNATURES: Final = ("2", "3", "4", "6")
"""Time signatures that the model knows: beats in a bar, without the note value."""

_LANGUAGES: Final = {
    "ar": "arabic, ara",
    "az": "azerbaijani",
    "bg": "bulgarian",
    "bn": "bengali",
    "ca": "catalan",
    "cs": "czech, ces, cze",
    "da": "danish, dan",
    "de": "german, deutsch, deu, ger",
    "el": "greek, ell, gre",
    "en": "english, eng",
    "es": "spanish, español, spa",
    "fa": "persian, farsi, fas, per",
    "fi": "finnish, fin",
    "fr": "french, français, fra, fre",
    "he": "hebrew, heb, iw",
    "hi": "hindi, hin",
    "hr": "croatian",
    "ht": "haitian creole",
    "hu": "hungarian, hun",
    "id": "indonesian, in, ind",
    "is": "icelandic",
    "it": "italian, italiano, ita",
    "ja": "japanese, jp, jpn",
    "ko": "korean, kor, kr",
    "la": "latin",
    "lt": "lithuanian",
    "ms": "malay",
    "ne": "nepali",
    "nl": "dutch, dut, nld",
    "no": "norwegian, nb, nn, nob, nor",
    "pa": "punjabi",
    "pl": "polish, pol",
    "pt": "portuguese, português, por",
    "ro": "romanian, ron, rum",
    "ru": "russian, rus",
    "sa": "sanskrit",
    "sk": "slovak",
    "sr": "serbian",
    "sv": "swedish, swe",
    "sw": "swahili",
    "ta": "tamil",
    "te": "telugu",
    "th": "thai, tha",
    "tl": "tagalog, filipino, fil",
    "tr": "turkish, tur",
    "uk": "ukrainian, ukr",
    "ur": "urdu",
    "vi": "vietnamese, vie",
    "yue": "cantonese",
    "zh": "chinese, mandarin, chi, cmn, cn, zho",
}
# Names of each language, then the codes of others: of three letters (ISO 639-2), older ones, and country codes that
# people take for languages.
_CODE_OF: Final = {name: code for code, names in _LANGUAGES.items() for name in names.split(", ")}

LANGUAGES: Final = frozenset({*_LANGUAGES, "unknown"})
"""Codes of languages that the model knows; "unknown" is for songs without singing and where none is told."""

INSTRUMENTAL: Final = "[Instrumental]"  # what stands in the place of lyrics where nobody sings

_NOTHING: Final = frozenset({"", "n/a", "na", "none", "null", "-", "?"})
_BARS: Final = {"2/4": "2", "2/2": "2", "3/4": "3", "4/4": "4", "6/8": "6"}
_MODES: Final = {
    **dict.fromkeys(("", "maj", "major", "dur", "M"), "major"),
    **dict.fromkeys(("m", "min", "minor", "moll"), "minor"),
}
_KEY: Final = re.compile(r"([A-Ha-h])\s*(#|b|♯|♭|sharp|flat|is|es|s)?[\s\-_:.]*([A-Za-z]*)\.?")
_SIGNS: Final = {"sharp": "#", "is": "#", "flat": "b", "es": "b", "s": "b"}
_CAMELOT_MINOR: Final = ("Ab", "Eb", "Bb", "F", "C", "G", "D", "A", "E", "B", "F#", "Db")
_CAMELOT_MAJOR: Final = ("B", "F#", "Db", "Ab", "Eb", "Bb", "F", "C", "G", "D", "A", "E")


@dataclass(frozen=True)
class Word:
    """A value as the model is told it."""

    # The value; "" (for beats per minute None) where nothing was said, which the model reads as "N/A".
    value: str | int | None
    known: bool = True  # whether the model was trained with it. False: it is `value` as it was typed.


def bpm(typed: object) -> Word:
    """Beats per minute: 120.0, "120 bpm" and "119.6" become whole numbers; "120-125" is not known."""
    text = _text(typed)
    found = re.fullmatch(r"(\d+(?:[.,]\d+)?)\s*(?:bpm)?", text.lower())
    if not text:
        return Word(None)
    if found is None:
        return Word(text, known=False)
    number = float(found[1].replace(",", "."))
    if not math.isfinite(number) or number > 10_000:
        return Word(text, known=False)
    beats = math.floor(number + 0.5)
    return Word(beats or None, known=beats == 0 or BPM_RANGE[0] <= beats <= BPM_RANGE[1])


def keyscale(typed: object) -> Word:
    """Key: "Am", "A min", "a-Moll" become "A minor"; "F# Major" and "F#" "F# major"; the DJ's "8A" "A minor".

    A small letter without a mode is not known: in some languages it means minor. German "H" is "B"; a German "B-Dur" is
    not known, because people mean either note by it.
    """
    text = _text(typed)
    if not text:
        return Word("")
    if camelot := re.fullmatch(r"(1[0-2]|[1-9])\s*([ABab])", text):
        minor = camelot[2] in "Aa"
        note = (_CAMELOT_MINOR if minor else _CAMELOT_MAJOR)[int(camelot[1]) - 1]
        return Word(f"{note} {'minor' if minor else 'major'}")
    found = _KEY.fullmatch(text)
    if found is None or (found[1].islower() and not found[3]):
        return Word(text, known=False)
    note, accidental, mode = found[1].upper(), found[2] or "", found[3]
    accidental = _SIGNS.get(accidental, accidental)
    named = _MODES.get(mode) or _MODES.get(mode.lower())
    if note == "H":
        note, named = "B", None if accidental else named
    elif note == "B" and not accidental and mode.lower() in ("dur", "moll"):
        named = None
    return Word(text, known=False) if named is None else Word(f"{note}{accidental} {named}")


def timesignature(typed: object) -> Word:
    """Time signature: "4/4" becomes "4", "6/8" "6"; "5/4" stays as typed and is not known."""
    text = _text(typed)
    bare = re.sub(r"\s|\.0$", "", text)
    value = _BARS.get(bare, bare)
    if not text or bare == "0":
        return Word("")
    return Word(value) if value in TIME_SIGNATURES else Word(text, known=False)


def language(typed: object) -> Word:
    """Language of the singing: "english", "EN", "en-US" and "eng" become "en"; "instrumental" becomes "unknown"."""
    text = _text(typed)
    name = text.lower()
    if name in ("", "instrumental", "auto", "unknown"):
        return Word("unknown" if name else "")
    first = re.split(r"[-_ ]", name)[0]
    for candidate in (name, first) if len(first) in (2, 3) else (name,):
        code = _CODE_OF.get(candidate, candidate)
        if code in LANGUAGES:
            return Word("yue" if name in ("zh-hk", "zh-yue") else code)
    return Word(text, known=False)


def _text(typed: object) -> str:
    text = "" if typed is None else str(typed).strip()
    return "" if text.lower() in _NOTHING else text
