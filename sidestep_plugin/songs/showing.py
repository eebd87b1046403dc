"""What is in a folder of finished songs: what the model is told about each, how it was made, and what looks wrong.

Reads files and judges; no model is needed. Nothing is refused that can be shown: a file that is no song is a row, too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ..text import counted, shown
from .dataset import FRAMES_A_SECOND, listed_in, made_for
from .making import FORMS, PADDED_ROWS, Making, making_of, renew_command
from .one_song import metadata_in, read_song
from .song_text import SongText, text_of_song, without_trigger
from .triggers import trigger_of_songs
from .values import not_finite_in
from .vocabulary import INSTRUMENTAL

_LYRICS_ROWS: Final = 512  # what upstream's preprocessing keeps, in tokens
_LETTERS: Final = 5  # letters a token, more than any language that the model knows has on average


@dataclass(frozen=True)
class ShownSong:
    """One file, by its name from the folder: its length, how it was made, what it says about itself in the model's
    words, and what looks wrong, a reason each. Length 0 and None for a file that is no song."""

    file: str
    seconds: float = 0.0
    making: Making | None = None
    text: SongText | None = None
    wrong: tuple[str, ...] = ()


@dataclass(frozen=True)
class ShownFolder:
    """A folder of songs."""

    folder: Path
    songs: tuple[ShownSong, ...]  # in the order in which a training reads them
    trigger: str = ""  # the trigger word, "" for none
    notes: tuple[str, ...] = ()  # what is to say about all of them
    renew: str = ""  # the command that gives them conditions as generated, "" where nothing speaks for it

    @property
    def seconds(self) -> float:
        """Length of all songs together."""
        return sum(song.seconds for song in self.songs)

    def reasons(self) -> Mapping[str, Sequence[str]]:
        """What looks wrong, each reason with the names of the songs."""
        found: dict[str, list[str]] = {}
        for song in self.songs:
            for reason in song.wrong:
                found.setdefault(reason, []).append(song.file)
        return found


def look_through(folder: Path) -> ShownFolder:
    """Look at every song of a folder. Raises Refusal."""
    files, missing, outside = listed_in(folder)
    trigger = trigger_of_songs(folder, files)
    word = trigger.word if trigger else ""
    songs = tuple(_shown(folder, file, word) for file in dict.fromkeys(files))
    notes = [f"manifest.json names {name}, which is not there" for name in missing[:5]]
    if len(missing) > 5:
        notes.append(f"manifest.json names {len(missing) - 5} more that are not there")
    notes += [f"manifest.json names {name}, which lies outside of the folder" for name in outside[:5]]
    notes += [
        f"{name} is named {count} times in manifest.json"
        for name, count in Counter(f.name for f in files).items()
        if count > 1
    ]
    makings = [song.making for song in songs if song.making is not None]
    notes += _about(makings)
    recorded = sorted({making.model for making in makings if making.model})
    if (model := made_for(folder)) is not None and [model] != recorded:
        notes.append(f"preprocess_meta.json: preprocessed for {shown(model, 60)}")
    forms = {making.form for making in makings}
    typed = any(song.text.changes for song in songs if song.text and song.making and song.making.form != "generated")
    renew = ""
    if forms & {"upstream", "own audio"} or len(forms) > 1 or len(recorded) > 1 or typed:
        renew = renew_command(folder, recorded[0] if len(recorded) == 1 else "")
    return ShownFolder(folder, songs, word, tuple(notes), renew)


def _about(makings: Sequence[Making]) -> Iterator[str]:
    """What is to say about the ways in which a folder's songs were made."""
    forms = Counter(making.form for making in makings)
    if "generated" in forms and len(forms) > 1:
        told = ", ".join(f"{count} {FORMS[form]}" for form, count in forms.most_common())
        yield f"songs of several kinds, which a training refuses: {told}"
    models = Counter(making.model for making in makings if making.model)
    if len(models) > 1:
        told = ", ".join(f"{counted(count, 'song')} by {model}" for model, count in models.most_common())
        yield f"conditions of several models, which a training refuses: {told}"
    elif models:
        yield f"prepared with {next(iter(models))}"
    padded = sorted({making.rows for making in makings if making.hidden and making.form != "generated"})
    if len(padded) > 1:
        rows = ", ".join(map(str, padded))
        yield f"conditions padded to several lengths, {rows} rows: were they made by several programs?"
    if forms["upstream"]:
        yield (
            f"{counted(forms['upstream'], 'song')} encoded ACE-Step's way: padded to {PADDED_ROWS} rows that the model "
            "attends to, lyrics without the header and cut at 512 tokens. The app generates with other conditions"
        )


def _shown(folder: Path, file: Path, trigger: str) -> ShownSong:
    place = next((place for place in (folder, folder.absolute()) if file.is_relative_to(place)), file.parent)
    name = file.relative_to(place).as_posix()
    song, problem = read_song(file)
    if problem:
        return ShownSong(name, wrong=(problem,))
    making = making_of(song)
    frames = len(song["target_latents"])
    metadata = metadata_in(song)
    text = text_of_song(metadata, file.name)
    wrong = list(_wrong(file, metadata, making, text, frames / FRAMES_A_SECOND, trigger))
    return ShownSong(name, frames / FRAMES_A_SECOND, making, text, tuple(wrong))


def _wrong(
    file: Path, metadata: Mapping[str, Any], making: Making, text: SongText, seconds: float, trigger: str
) -> Iterator[str]:
    if making.form == "own audio":
        yield "LoKr mode: the decoder is given the audio that it is to predict, and a training refuses it"
    for found in not_finite_in(file):
        yield f"values that are not finite (NaN or infinity): {found}"
    if not metadata:
        yield "says nothing about itself: no metadata"
        return
    told = metadata.get("duration")
    if not isinstance(told, int | float) or isinstance(told, bool):
        yield "does not say its duration"
    elif told <= 0:
        yield f'the model is told "duration: {told:g} seconds"'
    elif abs(told - seconds) > 1.5:
        yield f'the model is told "duration: {told:g} seconds", and {seconds:.1f} seconds are there'
    if "language" not in metadata and not text.instrumental:
        yield "does not say its language"
    elif not text.instrumental and text.language == "unknown":
        yield "has lyrics of an unknown language"
    stem = Path(str(metadata.get("filename") or file.name)).stem
    caption = str(metadata.get("caption") or "").strip()
    if not caption:
        yield "has no caption"
    elif _words(without_trigger(caption, trigger)) == _words(stem):
        yield "has no caption of its own, but the file's name"
    if making.form == "upstream" and not making.recorded and len(text.lyrics) > _LETTERS * _LYRICS_ROWS:
        yield f"lyrics of {len(text.lyrics)} letters: their end is cut off, after 512 tokens"
    record = metadata.get("prepared")
    for key, name, kept in (("caption_cut", "caption", 256), ("lyrics_cut", "lyrics", 2048)):
        if isinstance(record, Mapping) and isinstance(lost := record.get(key), int) and lost > 0:
            kept = 512 if making.form == "upstream" and key == "lyrics_cut" else kept
            yield f"{counted(lost, 'token')} of the {name} cut off, after {kept}"
    itself = f" ({file.name} itself)"
    if making.form != "generated":
        for change in text.changes:
            if not change.startswith("lyrics") and change.endswith(itself):
                yield f"not in the model's words: {change.removesuffix(itself)}"
    own = ("no caption", "no lyrics", "no language")
    yield from (problem.replace(itself, "") for problem in text.problems if not problem.startswith(own))


def _words(text: str) -> str:
    return " ".join(text.replace("_", " ").replace("-", " ").lower().split())


def first_words(lyrics: str) -> str:
    """The beginning of lyrics on one line, without the name of the part ("[Verse 1]")."""
    if lyrics == INSTRUMENTAL:
        return lyrics
    lines = [line.strip() for line in lyrics.splitlines() if line.strip() and not line.strip().startswith("[")]
    return cut(" / ".join(lines[:3]) or lyrics.strip(), 28)


def cut(text: str, longest: int) -> str:
    """A text on one line, not longer than `longest`, safe to print."""
    line = shown(" ".join(text.split()), 10 * longest)
    return line if len(line) <= longest else line[: longest - 3].rstrip() + "..."
