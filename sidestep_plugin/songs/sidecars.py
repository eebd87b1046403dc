"""Reads the files in which people keep what belongs to a song, each form into the same few fields.

Forms: a whole file for one field (``NAME.caption.txt``, ``NAME.lyrics.txt``), ``NAME.txt`` in three forms (lyrics
alone, as ACE-Step reads it; Side-Step's ``caption: ...`` lines with the lyrics last; ai-toolkit's ``<CAPTION>...``
tags), ``NAME.json``, tables (``*.csv``), and the dataset JSON of ACE-Step's tab and of Side-Step. Which form wins is no
matter of this file.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ..files import not_a_file

FIELDS: Final[Mapping[str, tuple[str, ...]]] = {
    "caption": ("caption", "prompt"),
    "genre": ("genre",),
    "lyrics": ("lyrics", "lyric"),
    "bpm": ("bpm", "tempo"),
    "keyscale": ("keyscale", "key_scale", "key", "scale"),
    "timesignature": ("timesignature", "time_signature", "signature", "time signature"),
    "language": ("language", "vocal_language", "lang"),
    "instrumental": ("is_instrumental", "instrumental"),
    "trigger": ("custom_tag", "trigger", "trigger_word"),
    "use": ("prompt_override",),
}
"""The fields of a song, each with the names that files have for it, in lower case. The first that is filled counts."""

_FIELD_OF: Final = {name: field for field, names in FIELDS.items() for name in names}
# Written by Side-Step and ai-toolkit, and measured from the audio or without meaning for us.
_PASSED_OVER: Final = frozenset({"duration", "repeat", "title", "artist", "album"})
_FILE_COLUMNS: Final = ("file", "filename", "file_name", "audio_path", "audio", "path")
_LARGEST_TEXT: Final = 2**20
_LARGEST_TABLE: Final = 2**26
_TAG: Final = re.compile(
    r"<(CAPTION|LYRICS|BPM|KEYSCALE|TIMESIGNATURE|DURATION|LANGUAGE)>(.*?)(?:</\1>|\Z)", re.I | re.S
)
_KEY_LINE: Final = re.compile(r"\s*([A-Za-z][A-Za-z_ ]{0,24}?)\s*:(.*)")

# Characters of Windows-1252 beyond ASCII that stand in texts of Western Europe: letters, and the signs of editors.
_WESTERN: Final = frozenset("ŠšŽžŒœŸÿƒ€‚„…‹›‘’“”•–—™¡¿«»·´¨§°©®ªº\u00a0\u00ad" + "".join(map(chr, range(0xC0, 0xFF))))


class Unreadable(Exception):
    """A file that cannot be read as text; the message says what was found, what was expected and what to do."""


@dataclass(frozen=True)
class Found:
    """What one file says about one song: the file and its form, the fields that hold something, as typed, and notes."""

    source: str
    values: Mapping[str, Any]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """A file about several songs: a CSV or a dataset JSON."""

    file: Path
    # For each song the file names by which it may be told (paths, base names), and what is said about it.
    rows: tuple[tuple[tuple[str, ...], Found], ...]
    notes: tuple[str, ...] = ()
    # trigger, position: the trigger word that a dataset JSON has for all songs, and where it goes in upstream's word;
    # "" where nothing is said.
    trigger: str = ""
    position: str = ""
    genre_ratio: float = 0.0  # percent of the songs that are told by their genre
    unlabeled: frozenset[int] = frozenset()  # numbers of the rows that upstream would leave out


def read_text(file: Path, largest: int = _LARGEST_TEXT) -> tuple[str, list[str]]:
    """A text file's content, and what had to be said about its encoding.

    A byte order mark is taken off, ends of lines become "\\n", white space around the text goes. Raises Unreadable if
    it is no regular file, too large, not text, or its encoding cannot be told.
    """
    try:
        if problem := not_a_file(file):
            raise Unreadable(f"{file.name} {problem}. Take it away, or put a text file there.")
        with file.open("rb") as stream:
            raw = stream.read(largest + 1)
    except OSError as error:
        raise Unreadable(f"{file.name} cannot be read ({error.strerror}).") from None
    if len(raw) > largest:
        raise Unreadable(f"{file.name} is larger than {largest >> 20} MiB, expected a text about a song.")
    text, note = _decoded(raw, file.name)
    return _unified(text).strip(), [note] if note else []


def _decoded(raw: bytes, name: str) -> tuple[str, str]:
    for mark, encoding in ((b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be")):
        if raw.startswith(mark):
            try:
                text = raw[len(mark) :].decode(encoding)
            except UnicodeDecodeError:
                raise Unreadable(f"{name} begins as {encoding.upper()} and does not go on so. {_SAVE}") from None
            return text, ""
    if b"\0" in raw:
        odd, even = raw[1::2].count(0), raw[0::2].count(0)
        for zeros, encoding in ((odd, "utf-16-le"), (even, "utf-16-be")):
            if len(raw) % 2 == 0 and zeros > 0.4 * (len(raw) // 2) and zeros > 8 * min(odd, even):
                return raw.decode(encoding, "replace"), f"{name} is UTF-16 and was read as such"
        raise Unreadable(f"{name} holds bytes of value 0, expected text. {_SAVE}")
    try:
        return raw.decode("utf-8"), ""
    except UnicodeDecodeError:
        pass
    # Windows-1252 gives some text for nearly every file, so it is believed only where it gives words.
    try:
        text = raw.decode("cp1252")
    except UnicodeDecodeError:
        text = ""
    foreign = [sign for sign in text if ord(sign) > 127]
    words = [word for word in text.split() if any(ord(sign) > 127 for sign in word)]
    if text and set(foreign) <= _WESTERN and not any(re.search(r"[^\x00-\x7f]{3}", word) for word in words):
        seen = ", ".join(f'"{word.strip(",.;:!?")}"' for word in words[:3])
        return text, f"{name} is not UTF-8 and was read as Windows-1252 ({seen}); save it as UTF-8 if that is wrong"
    raise Unreadable(f"{name} is not UTF-8, and its encoding cannot be told. {_SAVE}")


_SAVE: Final = "Save it as UTF-8 in your editor."


def whole(file: Path, field: str) -> Found:
    """A file that is one field: ``NAME.caption.txt``, ``NAME.lyrics.txt``. Raises Unreadable."""
    text, notes = read_text(file)
    return Found(file.name, {field: text} if text else {}, tuple(notes))


def text_file(file: Path) -> Found:
    """``NAME.txt`` in its form: ai-toolkit's tags, Side-Step's lines, or lyrics alone. Raises Unreadable."""
    text, notes = read_text(file)
    if _TAG.match(text):
        values = {_FIELD_OF[tag.lower()]: said.strip() for tag, said in _TAG.findall(text) if tag.lower() in _FIELD_OF}
        return Found(f"{file.name}, ai-toolkit's form", _filled(values), tuple(notes))
    if (lines := _key_lines(text)) is not None:
        values, said = lines
        notes += [f"{file.name} {note}" for note in said]
        lyrics = str(values.get("lyrics", ""))
        notes += [
            f'{file.name} has "{late[0].strip()}" below the lyrics, where it counts as lyrics. Move it above "lyrics:"'
            for line in lyrics.splitlines()
            if (late := _KEY_LINE.fullmatch(line)) and late[1].strip().lower() in _SURE_KEYS
        ]
        return Found(f"{file.name}, Side-Step's form", _filled(values), tuple(notes))
    if text and "\n" not in text and not text.startswith("["):
        notes.append(
            f"{file.name} has a single line and was read as lyrics, as ACE-Step reads it. If it is a caption, name the "
            f"file {file.stem}.caption.txt"
        )
    return Found(f"{file.name}, lyrics alone", {"lyrics": text} if text else {}, tuple(notes))


_SURE_KEYS: Final = frozenset({"bpm", "key", "keyscale", "signature", "timesignature", "genre", "caption"})


def _key_lines(text: str) -> tuple[dict[str, str], list[str]] | None:
    """The fields of Side-Step's form, and what had to be said; None for any other text, such as lyrics with a title."""
    values: dict[str, str] = {}
    notes: list[str] = []
    current, headed = "", False
    lines = text.splitlines()
    for number, line in enumerate(lines):
        found = _KEY_LINE.fullmatch(line)
        name = " ".join(found[1].lower().split()) if found else ""
        field = _FIELD_OF.get(name, "")
        if field == "lyrics" and found:
            values["lyrics"] = "\n".join([found[2].strip(), *lines[number + 1 :]]).strip()
            headed = len(values) > 1
            break
        if found and (field or name in _PASSED_OVER or "_" in name):
            if not field and name not in _PASSED_OVER:
                notes.append(f'has a line "{found[1].strip()}:" that is no field of a song and was not read')
            current = field or "passed over"
            if field:
                values.setdefault(field, found[2].strip())
        elif not current:
            return None  # the first line of this form is a field
        elif current in ("caption", "genre") and not line.lstrip().startswith("["):
            values[current] += "\n" + line
        elif line.strip():
            values["lyrics"] = "\n".join(lines[number:]).strip()
            notes.append('has text below its fields without a line "lyrics:"; it was read as lyrics')
            break
    if "caption" not in values and not headed:
        return None
    return {field: said.strip() for field, said in values.items()}, notes


def json_file(file: Path) -> Found:
    """``NAME.json``: an object with fields of a song. Raises Unreadable."""
    value, notes = read_json(file)
    if not isinstance(value, dict):
        raise Unreadable(f"{file.name} holds a {_kind(value)}, expected an object with caption, bpm, keyscale, ...")
    values, problems = fields_of(value, file.name)
    if not values and value and not problems:
        problems = [f"{file.name} has none of the fields of a song ({', '.join(sorted(FIELDS))})"]
    return Found(file.name, values, (*notes, *problems))


def read_json(file: Path) -> tuple[Any, list[str]]:
    """What a JSON file holds, and what had to be said about its encoding. Raises Unreadable."""
    text, notes = read_text(file, _LARGEST_TABLE)
    try:
        return json.loads(text), notes
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise Unreadable(f"{file.name} is no JSON ({reason}). Correct it, or take it out of the folder.") from None


def dataset_json(file: Path, value: Any) -> Table | None:
    """The dataset JSON of ACE-Step's tab or of Side-Step, from what the file holds; None if it is something else."""
    about = value.get("metadata") if isinstance(value, dict) else None
    samples = value.get("samples") if isinstance(value, dict) else value
    if not isinstance(samples, list) or not samples or not all(isinstance(sample, dict) for sample in samples):
        return None
    rows: list[tuple[tuple[str, ...], Found]] = []
    notes: list[str] = []
    unlabeled: set[int] = set()
    for number, sample in enumerate(samples):
        names = tuple(str(sample[name]) for name in ("audio_path", "filename") if sample.get(name))
        if not names:
            notes.append(f'{file.name}: entry {number + 1} of "samples" has neither audio_path nor filename')
            continue
        values, problems = fields_of(sample, file.name)
        if sample.get("labeled") is False:
            unlabeled.add(len(rows))
        raw = str(sample.get("raw_lyrics") or "").strip()
        if values.get("lyrics") == "[Instrumental]" and raw not in ("", "[Instrumental]"):
            problems.append(f"{file.name} has raw_lyrics and says [Instrumental] under lyrics, which is used")
        rows.append((names, Found(file.name, values, tuple(problems))))
    if not rows:
        return None
    trigger, position, ratio = tags(about)
    return Table(file, tuple(rows), tuple(notes), trigger, position, ratio, frozenset(unlabeled))


def tags(about: Any) -> tuple[str, str, float]:
    """Trigger word, its position in upstream's word, and percent of songs told by genre, from a metadata block."""
    if not isinstance(about, dict):
        return "", "", 0.0
    ratio = about.get("genre_ratio")
    word = about.get("custom_tag")
    position = about.get("tag_position")
    return (
        word.strip() if isinstance(word, str) else "",
        position if isinstance(position, str) else "",
        float(ratio) if isinstance(ratio, int | float) and not isinstance(ratio, bool) else 0.0,
    )


def csv_file(file: Path) -> Table:
    """A table with a column of file names: File, BPM, Key, Caption as ACE-Step reads them, and the other fields.

    Raises Unreadable.
    """
    text, notes = read_text(file, _LARGEST_TABLE)
    first = text.partition("\n")[0]
    separator = max(",;\t", key=first.count)
    try:
        lines = list(csv.reader(io.StringIO(text, newline=""), delimiter=separator))
    except csv.Error as error:
        raise Unreadable(f"{file.name} is no table ({error}). Save it again from your spreadsheet.") from None
    header = [name.strip().lower() for name in lines[0]] if lines else []
    column = next((header.index(name) for name in _FILE_COLUMNS if name in header), None)
    if column is None:
        return Table(file, (), (*notes, f"{file.name} has no column File, so it was not read"))
    rows: list[tuple[tuple[str, ...], Found]] = []
    for number, cells in enumerate(lines[1:], 2):
        if column >= len(cells) or not cells[column].strip():
            continue
        cells_of = dict(zip(header, (cell.strip() for cell in cells), strict=False))
        values, problems = fields_of(cells_of, file.name)
        if len(cells) > len(header):
            problems.append(
                f'{file.name}, row {number}, has more cells than the header: put a text with "{separator}" into quotes'
            )
        rows.append(((cells[column].strip(),), Found(f"{file.name}, row {number}", values, tuple(problems))))
    return Table(file, tuple(rows), tuple(notes))


def fields_of(said: Mapping[str, Any], name: str) -> tuple[dict[str, Any], list[str]]:
    """The fields of a song in a mapping with anybody's names for them, and what could not be used."""
    lower = {str(key).strip().lower(): value for key, value in said.items()}
    values: dict[str, Any] = {}
    problems: list[str] = []
    for field, names in FIELDS.items():
        for value in (lower[key] for key in names if key in lower):
            if isinstance(value, list | tuple) and value and all(isinstance(item, str) for item in value):
                value = ("\n" if field == "lyrics" else ", ").join(value)
            if value is None or (isinstance(value, str) and not value.strip()):
                continue
            if not isinstance(value, str | int | float) or (isinstance(value, bool) and field != "instrumental"):
                problems.append(f"{name}: {field} is a {_kind(value)}, expected text or a number; it was not used")
                continue
            values[field] = _unified(value).removeprefix("\ufeff").strip() if isinstance(value, str) else value
            break
    return values, problems


def _unified(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _filled(values: Mapping[str, str]) -> dict[str, str]:
    return {field: said for field, said in values.items() if said}


def _kind(value: object) -> str:
    names = {"dict": "object", "list": "list", "str": "text", "bool": "truth value", "NoneType": "null"}
    return names.get(type(value).__name__, "number")
