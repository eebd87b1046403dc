"""What the model is told about each song: found in people's files and brought into the model's words.

Each value is kept with its source. Pure: no torch, no model, nothing is written.

Precedence, for each field on its own; the first that says something wins, and contradictions are told:

1. the dataset JSON that was named (``dataset=``)
2. a CSV in the song's folder, else one in the folder above, up to the top
3. ``NAME.json``
4. ``NAME.caption.txt``, ``NAME.lyrics.txt``
5. ``NAME.txt``
6. a dataset JSON in the folder, as ACE-Step's tab and Side-Step write it (Side-Step makes it out of the files above)
7. what a finished song says about itself (``known=``)

2 to 5 is upstream's own order. The duration is no field: it is measured.
"""

from __future__ import annotations

import random
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Final, Literal

from ..errors import Refusal
from ..files import is_companion
from ..text import listed, shown
from . import near_names, sidecars, vocabulary
from .sidecars import Found, Table, Unreadable
from .song_names import folded
from .vocabulary import INSTRUMENTAL, Word

Position = Literal["before", "after", "instead"]
POSITIONS: Final[Mapping[str, Position]] = {"prepend": "before", "append": "after", "replace": "instead"}
"""Where the trigger word goes, by upstream's word for it: "word, caption", "caption, word", "word"."""

DEFAULT: Final = "default"  # the source of a value that no file gave

_ITSELF: Final = " itself"
_FOR_ALL: Final = "--language"


@dataclass(frozen=True)
class Trigger:
    """A trigger word, where it goes, and who said so."""

    word: str
    position: Position = "before"
    source: str = "--trigger"


@dataclass(frozen=True)
class SongText:
    """What the model is told about a song, except for its duration."""

    caption: str  # the description of the song without the trigger word; the genre, where `use` says so
    lyrics: str = INSTRUMENTAL  # the lyrics, "[Instrumental]" where nobody sings; never empty
    # Beats per minute, None where unknown; a text where it is out of the model's vocabulary.
    bpm: int | str | None = None
    keyscale: str = ""  # the key, such as "F# minor"; "" where unknown
    timesignature: str = ""  # "2", "3", "4" or "6"; "" where unknown; another text where it is out of the vocabulary
    language: str = "unknown"  # code of the language of the singing; "unknown" where nobody sings or none is told
    instrumental: bool = True  # whether nobody sings
    genre: str = ""  # the genre, "" where none is told
    use: Literal["caption", "genre"] = "caption"  # which of the two is told as the caption, "caption" or "genre"
    trigger: str = ""  # the trigger word, "" for none
    position: Position = "before"  # where the trigger word goes
    # For each of the fields above the file that it is from, or "default".
    sources: Mapping[str, str] = field(default_factory=dict)
    changes: tuple[str, ...] = ()  # what was brought into the model's words, a line each
    # What was missing and what is told instead, contradictions, and values that the model does not know.
    problems: tuple[str, ...] = ()

    @property
    def prompt(self) -> str:
        """The caption with the trigger word, as upstream puts them together; a caption that holds it stays as it is."""
        if not self.trigger or self.position == "instead":
            return self.trigger or self.caption
        if not self.caption or holds(self.caption, self.trigger):
            return self.caption or self.trigger
        parts = (self.trigger, self.caption) if self.position == "before" else (self.caption, self.trigger)
        return ", ".join(parts)


@dataclass(frozen=True)
class Texts:
    """What the model is told about each song of a folder, and lines about tables, rows and files without a song."""

    songs: Mapping[Path, SongText]
    notes: tuple[str, ...] = ()


def find_texts(
    folder: Path,
    songs: Iterable[Path],
    *,
    dataset: Path | None = None,
    trigger: Trigger | None = None,
    as_typed: bool = False,
    known: Mapping[Path, Mapping[str, Any]] | None = None,
    texts: Path | None = None,
    language: str | None = None,
) -> Texts:
    """Find what belongs to each song, in every form.

    Args:
        folder: the folder from which paths in tables are told.
        songs: the songs' files in it: audio, or finished songs. They are not opened.
        dataset: a dataset JSON that was named; it may lie anywhere.
        trigger: a trigger word for all songs. Without it that of the song, of the dataset, of manifest.json or of
            preprocess_meta.json is taken over.
        as_typed: leave values as they are typed.
        known: metadata of finished songs (the "metadata" of a ``.pt`` file), where songs are such files. Files may be
            named after the song or after the audio that its metadata names.
        texts: another folder in which files that belong to finished songs lie, such as that of the audio.
        language: what is sung in songs about which nothing else says it.

    Raises:
        Refusal: files cannot be read, all named with the reason, or `dataset` is no dataset JSON.
    """
    files = list(dict.fromkeys(songs))
    known = known or {}
    look = _Look(folder, files, known, texts)
    if dataset is not None:
        look.read_named(dataset)
    general = look.trigger()
    told: dict[Path, SongText] = {}
    for file in files:
        candidates = look.of(file)
        if metadata := known.get(file):
            candidates.append(_said_by_itself(metadata, file.name))
        said = {str(one.values.get("language", "")).strip().lower() for one in candidates}
        if language and said <= {"", "unknown", "auto"}:  # which is what programs write that know none
            candidates.insert(0, Found(_FOR_ALL, {"language": language}))
        told[file] = _together(file, candidates, trigger=trigger, general=general, as_typed=as_typed)
    if look.unreadable:
        lines = " ".join(dict.fromkeys(look.unreadable))
        raise Refusal(f"Texts that cannot be read in {folder}, expected UTF-8 text or JSON: {lines}")
    return Texts(told, tuple(look.notes(dataset)))


def text_of_song(metadata: Mapping[str, Any], name: str, *, as_typed: bool = False) -> SongText:
    """What a finished song says about itself: its caption already holds upstream's tag.

    `metadata` is that of its ``.pt`` file; anything missing is told in `problems`. The file's name is for the lines.
    """
    return _together(Path(name), [_said_by_itself(metadata, name)], trigger=None, general=None, as_typed=as_typed)


def trigger_of(folder: Path) -> Trigger | None:
    """The trigger word that manifest.json or preprocess_meta.json of a folder names; None where there is none."""
    for name in ("manifest.json", "preprocess_meta.json"):
        try:
            value, _ = sidecars.read_json(folder / name)
        except Unreadable:
            continue
        about = value.get("metadata") if name == "manifest.json" and isinstance(value, dict) else value
        word, position, _ = sidecars.tags(about)
        if word:
            return Trigger(word, _position(position, "before"), name)
    return None


def holds(caption: str, word: str) -> bool:
    """Whether a caption holds a trigger word as a word of its own, in the same capital and small letters."""
    start = caption.find(word)
    while start >= 0:
        end = start + len(word)
        before, after = caption[:start][-1:], caption[end : end + 1]
        if not (before.isalnum() or after.isalnum()):
            return True
        start = caption.find(word, start + 1)
    return False


def without_trigger(caption: str, word: str) -> str:
    """A caption without a trigger word that upstream put in front or behind."""
    return "" if caption == word else caption.removeprefix(f"{word}, ").removesuffix(f", {word}")


def _said_by_itself(metadata: Mapping[str, Any], name: str) -> Found:
    values, problems = sidecars.fields_of(metadata, name)
    prepared = metadata.get("prepared")
    if isinstance(prepared, Mapping) and prepared.get("trigger"):
        values |= {"trigger": str(prepared["trigger"]), "position": str(prepared.get("trigger_position") or "")}
    return Found(f"{name}{_ITSELF}", values, tuple(problems))


# -- which files belong to which song ---------------------------------------------------------------------------------


class _Look:
    """One look at a folder: each file is read once."""

    def __init__(
        self, folder: Path, songs: Sequence[Path], known: Mapping[Path, Mapping[str, Any]], texts: Path | None
    ) -> None:
        self.folder = folder
        self.texts = texts
        self.songs = songs
        self.unreadable: list[str] = []
        self._audio = {song: _audio_of(known.get(song, {})) for song in songs}
        stems = {song: [PurePosixPath(name).stem for name in self._audio[song]] for song in songs}
        count = Counter(stem for song in songs for stem in set(map(folded, stems[song])))
        self._names = {
            song: list(dict.fromkeys([song.stem, *(stem for stem in stems[song] if count[folded(stem)] == 1)]))
            for song in songs
        }
        self._listing: dict[Path, dict[str, list[Path]]] = {}
        self._used: set[Path] = set()
        self._notes: list[str] = []
        above = {parent for song in songs for parent in song.parents if parent == folder or folder in parent.parents}
        self._folders = [folder, *sorted(above - {folder})]
        if texts is not None and texts not in self._folders:
            self._folders[:0] = [texts]
        self._tables: list[dict[Path, Found]] = []
        self._datasets: list[tuple[Table, dict[Path, Found]]] = []
        self._named: tuple[Table, dict[Path, Found]] | None = None
        for place in reversed(self._folders):  # the innermost first
            self._read_tables(place)

    def _files(self, place: Path) -> dict[str, list[Path]]:
        """A folder's files by their names without differences of capitals and of composed letters."""
        if place not in self._listing:
            listing: dict[str, list[Path]] = {}
            try:
                for file in sorted(place.iterdir()):
                    if not file.name.startswith(".") and not is_companion(file.name):
                        listing.setdefault(folded(file.name), []).append(file)
            except FileNotFoundError:
                pass
            except OSError as error:
                self.unreadable.append(f"{place} cannot be listed ({error.strerror}).")
            self._listing[place] = listing
        return self._listing[place]

    def _beside(self, song: Path, ending: str) -> Path | None:
        """The file named after a song with an ending; one of exactly its name before one with other capitals."""
        for place, stem in self._places_of(song):
            alike = self._files(place).get(folded(stem + ending), [])
            exact = [file for file in alike if _same(file.name) == _same(stem + ending)]
            if found := exact or (alike if len(alike) == 1 else []):
                self._used.add(found[0])
                return found[0]
        return None

    def _places_of(self, song: Path) -> Iterator[tuple[Path, str]]:
        """Where a song's files may lie, and after what they may be named."""
        yield from ((song.parent, stem) for stem in self._names[song])
        if self.texts is None:
            return
        for path in map(PurePosixPath, self._audio[song]):  # the path of the audio, from the outermost folder inwards
            for first in range(1 if path.anchor else 0, len(path.parts) - 1):
                place = self.texts.joinpath(*path.parts[first:-1])
                if not any(part in ("..", ":") for part in path.parts[first:-1]) and place.is_dir():
                    yield place, path.stem
        yield from ((self.texts, stem) for stem in self._names[song])

    def _read_tables(self, place: Path) -> None:
        stems = {folded(stem) for song in self.songs if song.parent == place for stem in self._names[song]}
        for file in (file for files in self._files(place).values() for file in files):
            ending = file.suffix.lower()
            if ending == ".csv":
                if (table := self._try(sidecars.csv_file, file)) is not None:
                    self._used.add(file)
                    self._tables.append(self._match(table, place))
            elif ending == ".json" and file.name not in ("manifest.json", "preprocess_meta.json"):
                own = folded(file.stem) in stems
                if own or not file.is_file():
                    continue
                try:  # any other JSON file may lie about: only a dataset JSON is ours
                    table = sidecars.dataset_json(file, sidecars.read_json(file)[0])
                except Unreadable as problem:
                    self._notes.append(str(problem))
                    self._used.add(file)
                    continue
                if table is not None:
                    self._used.add(file)
                    self._datasets.append((table, self._match(table, place)))

    def _try(self, read: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return read(*arguments)
        except Unreadable as problem:
            self.unreadable.append(str(problem))
            return None

    def read_named(self, file: Path) -> None:
        """Read the dataset JSON that was named."""
        try:
            table = sidecars.dataset_json(file, sidecars.read_json(file)[0])
        except Unreadable as problem:
            raise Refusal(f"{file} was named, expected a dataset JSON: {problem}") from None
        if table is None:
            raise Refusal(
                f'{file} is no dataset JSON: expected "samples", a list of songs with audio_path or filename, as '
                "ACE-Step's LoRA training tab saves it."
            )
        self._named = table, self._match(table, file.parent)

    def _match(self, table: Table, place: Path) -> dict[Path, Found]:
        """What a table says about each song: rows name songs by path, else by a name that only one song has."""
        below = [file for file in self.songs if place in file.parents] or list(self.songs)
        by_path: dict[str, set[Path]] = {}
        for file in below:
            for path in self._paths_of(file, place):
                by_path.setdefault(folded(path), set()).add(file)
        by_name: dict[str, set[Path]] = {}
        for file in below:
            for name in (file.name, *self._names[file], *(PurePosixPath(path).name for path in self._audio[file])):
                by_name.setdefault(folded(name), set()).add(file)
        rows: dict[Path, list[Found]] = {}
        lost: list[str] = []
        unclear: list[str] = []
        order: list[Path | None] = []
        for names, found in table.rows:
            exact = (by_path[path] for name in names for path in _tails(name) if path in by_path)
            song: Path | None = next((next(iter(one)) for one in exact if len(one) == 1), None)
            if song is None:
                bases = [folded(PurePosixPath(_forward(name)).name) for name in names]
                matches: set[Path] = next((by_name[base] for base in bases if base in by_name), set())
                if len(matches) == 1:
                    song = next(iter(matches))
                else:
                    (unclear if matches else lost).append(names[0])
            order.append(song)
            if song is not None:
                rows.setdefault(song, []).append(found)
        if lost:
            self._notes.append(f"{table.file.name} names {listed(lost)}: no such song here")
        if unclear:
            self._notes.append(
                f"{table.file.name} names {listed(unclear)}, and several songs are called so: none of them got it. "
                "Write the path there, such as album/song.wav"
            )
        self._notes.extend(table.notes)
        by_genre = _told_by_genre(table, order)
        return {song: _of_table(table, found, by_genre=song in by_genre) for song, found in rows.items()}

    def _paths_of(self, song: Path, place: Path) -> Iterator[str]:
        """The paths by which a table in `place` may name a song."""
        for start in (place, self.folder):
            if song.is_relative_to(start):
                yield song.relative_to(start).as_posix()
        yield song.absolute().as_posix()
        yield from (end for path in self._audio[song] if "/" in path for end in _tails(path))

    def of(self, song: Path) -> list[Found]:
        """What the files say about a song, in the order of precedence."""
        tables = [self._named[1], *self._tables] if self._named is not None else self._tables
        found = [table[song] for table in tables if song in table]
        for ending, read in _BESIDE:
            file = self._beside(song, ending)
            if file is not None and (one := self._try(read, file)) is not None:
                found.append(one)
        return found + [rows[song] for _, rows in self._datasets if song in rows]

    def trigger(self) -> Trigger | None:
        """The trigger word for all songs that a dataset JSON or a folder of finished songs names."""
        for table, _ in filter(None, (self._named, *self._datasets)):
            if table.trigger:
                return Trigger(table.trigger, _position(table.position, "before"), table.file.name)
        return trigger_of(self.folder)

    def notes(self, dataset: Path | None) -> Iterable[str]:
        """The lines about the folder, each once."""
        yield from dict.fromkeys(self._notes)
        endings = (".caption.txt", ".lyrics.txt", ".txt", ".json", ".csv")
        ignored = {"manifest.json", "preprocess_meta.json", "readme.txt", "license.txt"}
        left = [
            file
            for place in self._folders
            for files in self._files(place).values()
            for file in files
            if file.name.lower().endswith((*endings, *near_names.OTHERS)) and file.name.lower() not in ignored
            and file not in self._used and file not in self.songs and file != dataset
        ]  # fmt: skip
        meant = {file: self._meant(file) for file in left}
        if left := [file for file in left if meant[file] or file.name.lower().endswith(endings)]:
            names = [f"{file.name} (expected {meant[file]})" if meant[file] else file.name for file in left]
            yield f"No song belongs to {listed(names)}"

    def _meant(self, file: Path) -> str | None:
        """The name that was perhaps meant for a file that belongs to no song."""
        songs = {name for song in self.songs if file.parent in (song.parent, self.texts) for name in self._names[song]}
        there = [other.name for files in self._files(file.parent).values() for other in files]
        return near_names.expected(file.name, songs, there)


_BESIDE: Final[tuple[tuple[str, Callable[[Path], Found]], ...]] = (
    (".json", sidecars.json_file),
    (".caption.txt", lambda file: sidecars.whole(file, "caption")),
    (".lyrics.txt", lambda file: sidecars.whole(file, "lyrics")),
    (".txt", sidecars.text_file),
)
"""Files named after a song, in the order of precedence."""


def _audio_of(metadata: Mapping[str, Any]) -> list[str]:
    """The audio that a finished song was made from, as its metadata names it."""
    said = [metadata.get(name) for name in ("filename", "audio_path")]
    return [_forward(name) for name in said if isinstance(name, str) and name.strip()]


def _forward(path: str) -> str:
    return path.strip().replace("\\", "/")


def _same(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _tails(name: str) -> Iterator[str]:
    """A path in a table and its ends of two parts and more: it may have been written on another machine."""
    parts = PurePosixPath(_forward(name)).parts
    yield folded(PurePosixPath(*parts).as_posix()) if parts else ""
    for first in range(1, len(parts) - 1):
        yield folded("/".join(parts[first:]))


def _of_table(table: Table, found: Sequence[Found], *, by_genre: bool) -> Found:
    """What a table says about a song in its rows: the first one counts."""
    first, values = found[0], dict(found[0].values)
    if by_genre and "use" not in values and values.get("genre"):
        values["use"] = "genre"
    if values.get("trigger") == table.trigger or ("trigger" not in values and table.trigger):
        values["trigger"] = table.trigger
        if table.position:
            values["position"] = table.position
    doubled = f"{table.file.name} names this song {len(found)} times: the first counts"
    return replace(first, values=values, notes=(*first.notes, doubled) if len(found) > 1 else first.notes)


def _told_by_genre(table: Table, order: Sequence[Path | None]) -> set[Path]:
    """The songs that upstream tells by their genre: a share of the labeled ones, the same in every run.

    Upstream shuffles their numbers with Python's generator at seed 42 and takes the first of them.
    """
    labeled = [song for number, song in enumerate(order) if number not in table.unlabeled]
    numbers = list(range(len(labeled)))
    random.Random(42).shuffle(numbers)
    chosen = numbers[: int(len(labeled) * max(0.0, min(100.0, table.genre_ratio)) / 100)]
    return {song for number in chosen if (song := labeled[number]) is not None}


# -- one text out of all that was found --------------------------------------------------------------------------------


def _together(
    song: Path, candidates: Sequence[Found], *, trigger: Trigger | None, general: Trigger | None, as_typed: bool
) -> SongText:
    chosen: dict[str, tuple[Any, str]] = {}
    problems = list(dict.fromkeys(note for one in candidates for note in one.notes))
    for field_name in sidecars.FIELDS:
        said = [(one.values[field_name], one.source) for one in candidates if field_name in one.values]
        if said:
            chosen[field_name] = said[0]
            problems += _contradictions(field_name, said, song)
    changes: list[str] = []
    sources = {name: source for name, (_, source) in chosen.items()}

    def value(name: str) -> Any:
        return chosen.get(name, ("", ""))[0]

    def brought(name: str) -> Any:
        word = _WORDS[name]
        if name not in chosen:
            sources[name] = DEFAULT
            return word("").value
        typed, source = chosen[name]
        result = word(typed)
        if as_typed:
            if name == "bpm" and isinstance(typed, int):
                return typed
            return str(typed) if typed else word("").value
        if not result.known:
            problems.append(f'{name}: the model does not know "{shown(typed, 60)}" ({source}); it knows {_KNOWN[name]}')
        elif str(result.value) != str(typed):
            became = "nothing" if result.value in (None, "") else f'"{result.value}"'
            changes.append(f'{name}: "{shown(typed, 60)}" becomes {became} ({source})')
        return result.value

    bpm = brought("bpm")
    keyscale, timesignature = str(brought("keyscale")), str(brought("timesignature"))
    language = str(brought("language")) or "unknown"
    lyrics, instrumental = _lyrics(song, chosen, sources, changes, problems, as_typed=as_typed)
    if instrumental:
        if sources["language"] == _FOR_ALL:
            language, sources["language"] = "unknown", DEFAULT
        elif language != "unknown" and not as_typed:
            changes.append(f'language: "{language}" becomes "unknown", because nobody sings')
            language = "unknown"
    elif language == "unknown":
        problems.append('no language: "unknown" is told, as in the app when none is chosen. Name it in '
                        f"{song.stem}.json, such as {{\"language\": \"en\"}}")  # fmt: skip
    caption, genre = str(value("caption")).strip(), str(value("genre")).strip()
    use: Literal["caption", "genre"] = "genre" if value("use") == "genre" and genre else "caption"
    before = _own_trigger(candidates, general) or general
    tag = trigger or before
    if trigger and before and sources.get("caption", "").endswith(_ITSELF):
        bare = without_trigger(caption, before.word)
        if bare != caption and trigger.word != before.word:
            changes.append(f'the trigger word "{shown(before.word, 60)}" is taken out of the caption')
            caption = bare
    if use == "genre":
        caption, sources["caption"] = genre, sources["genre"]
    elif not caption and not (tag and tag.position == "instead"):
        caption = genre or song.stem.replace("_", " ").replace("-", " ").strip() or song.stem
        instead = "the genre" if genre else "the file's name"
        sources["caption"] = sources["genre"] if genre else DEFAULT
        problems.append(f'no caption: {instead}, "{shown(caption, 60)}", is told. Write {song.stem}.caption.txt')
    word, position = (tag.word, tag.position) if tag else ("", "before")
    sources["trigger"] = tag.source if tag else DEFAULT
    if word and position != "instead" and holds(caption, word):
        changes.append(f'the caption already holds the trigger word "{shown(word, 60)}": it is not added again')
    for name in ("genre", "instrumental", "caption", "lyrics"):
        sources.setdefault(name, DEFAULT)
    kept = {name: sources[name] for name in sidecars.FIELDS if name in sources}
    return SongText(
        caption, lyrics, bpm, keyscale, timesignature, language, instrumental, genre, use, word, position,
        kept, tuple(changes), tuple(dict.fromkeys(problems)),
    )  # fmt: skip


_WORDS: Final[Mapping[str, Callable[[object], Word]]] = {
    "bpm": vocabulary.bpm,
    "keyscale": vocabulary.keyscale,
    "timesignature": vocabulary.timesignature,
    "language": vocabulary.language,
}
_KNOWN: Final = {
    "bpm": f"whole numbers from {vocabulary.BPM_RANGE[0]} to {vocabulary.BPM_RANGE[1]}",
    "keyscale": 'keys such as "F# minor"',
    "timesignature": ", ".join(vocabulary.TIME_SIGNATURES),
    "language": "codes such as en",
}


def _own_trigger(candidates: Sequence[Found], general: Trigger | None) -> Trigger | None:
    for one in candidates:
        if word := str(one.values.get("trigger", "")).strip():
            fallback = general.position if general is not None else "before"
            return Trigger(word, _position(one.values.get("position"), fallback), one.source)
    return None


def _position(said: object, otherwise: Position) -> Position:
    """A position in upstream's word or in ours."""
    return next((ours for theirs, ours in POSITIONS.items() if said in (theirs, ours)), otherwise)


def _lyrics(
    song: Path,
    chosen: Mapping[str, tuple[Any, str]],
    sources: dict[str, str],
    changes: list[str],
    problems: list[str],
    *,
    as_typed: bool,
) -> tuple[str, bool]:
    """The lyrics, and whether nobody sings."""
    lyrics = str(chosen.get("lyrics", ("", ""))[0])
    flag, said_by = chosen.get("instrumental", (None, ""))
    flagged = str(flag).strip().lower() in ("true", "1", "yes")
    if str(chosen.get("language", ("", ""))[0]).strip().lower() == "instrumental":
        flagged, said_by = True, said_by or chosen["language"][1]
    if not lyrics.strip():
        if flagged:
            sources["lyrics"] = said_by
        else:
            problems.append(
                f'no lyrics: "{INSTRUMENTAL}" is told. Write {song.stem}.lyrics.txt, with {INSTRUMENTAL} in it where '
                "nobody sings"
            )
        return INSTRUMENTAL, True
    if lyrics.strip().strip("[]()").strip().lower() in ("instrumental", "inst"):
        if lyrics != INSTRUMENTAL and not as_typed:
            changes.append(f'lyrics: "{shown(lyrics, 60)}" becomes "{INSTRUMENTAL}" ({chosen["lyrics"][1]})')
            lyrics = INSTRUMENTAL
        return lyrics, True
    if flagged:
        where = chosen["lyrics"][1]
        problems.append(f"instrumental according to {said_by}, with lyrics in {where}: the lyrics are told")
    return lyrics, False


def _contradictions(name: str, said: Sequence[tuple[Any, str]], song: Path) -> list[str]:
    """Files that say other things than the one that wins; what programs write where they know nothing is no word."""
    if name in ("instrumental", "use"):
        return []

    def plain(value: Any) -> str:
        meant = _WORDS[name](value).value if name in _WORDS else value
        return " ".join(str("" if meant is None else meant).lower().split())

    nothing = {"", "unknown", "[instrumental]", song.stem.replace("_", " ").replace("-", " ").lower()}
    first, winner = said[0]
    others = dict.fromkeys(source for value, source in said[1:] if plain(value) not in nothing | {plain(first)})
    if not others:
        return []
    say = "says" if len(others) == 1 else "say"
    return [f"{name}: {winner} is used, {listed(list(others))} {say} something else"]
