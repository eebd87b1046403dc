"""Which songs there are, what the model is told about each, and what has to be made anew: nothing is encoded here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from ..engine.song_files import Encoders, hash_of_tensor, record_in, words_of
from ..errors import Refusal
from ..songs.audio import audio_files, look_at
from ..songs.dataset import FRAMES_A_SECOND, songs_in
from ..songs.one_song import frames_in, load_song, read_song
from ..songs.song_names import song_names
from ..songs.song_text import SongText, find_texts
from ..songs.values import hash_of, not_finite_in
from ..text import counted, shown
from .request import PrepareRequest

ALL: Final = "all"
CONDITIONS: Final = "conditions"
NOTHING: Final = "nothing"

_MOST: Final = 5  # names in a list


@dataclass
class Song:
    """A song that is to be prepared.

    Attributes:
        source: the audio, or the finished song that is renewed.
        name: the source's path from its folder, with slashes.
        file: the file that it becomes.
        text: what the model is told.
        seconds: length of the song, as far as it is known before encoding.
        digest: SHA-256 of the audio file; of the latents of a finished song.
        before: what the file that is there says about how it was made; None where there is none.
        make: "all", "conditions" or "nothing".
        problems: what is missing or odd, and what is used instead; ``--strict`` refuses them.
        notes: what is told only.
        unusable: why no song can be made of it, "" when one can.
    """

    source: Path
    name: str
    file: Path
    text: SongText
    seconds: float
    digest: str
    before: Mapping[str, Any] | None = None
    make: str = ALL
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unusable: str = ""

    @property
    def sound(self) -> Mapping[str, Any]:
        """Where the latents of the file that is there come from."""
        found = (self.before or {}).get("sound")
        return found if isinstance(found, Mapping) else {}


@dataclass(frozen=True)
class Plan:
    """The songs of a folder, and lines about the folder.

    Attributes:
        removed: names of songs in the output folder whose source is no longer there.
    """

    songs: tuple[Song, ...]
    notes: tuple[str, ...]
    removed: tuple[str, ...]

    @property
    def usable(self) -> list[Song]:
        return [song for song in self.songs if not song.unusable]

    @property
    def to_make(self) -> list[Song]:
        return [song for song in self.usable if song.make != NOTHING]


def plan(request: PrepareRequest, *, look: bool = False) -> Plan:
    """Look at the songs and at what is in the output folder.

    Args:
        request: what was asked for.
        look: whether to look at the sound of songs that are finished already, too.

    Raises:
        Refusal: no songs, texts that cannot be read, other people's songs in the output folder, or, with ``--strict``,
            songs with problems.
    """
    check_apart(request)
    found = _finished(request) if request.renew else _audio(request, look)
    songs, notes = found
    removed = _compare_with_output(request, songs)
    if request.strict and (bad := [song for song in songs if song.problems or song.unusable]):
        lines = [f"{shown(song.name)}: {'; '.join([*filter(None, [song.unusable]), *song.problems])}" for song in bad]
        raise Refusal("\n".join([f"--strict, and {counted(len(bad), 'song')} with problems:", *lines]))
    return Plan(tuple(songs), tuple(notes), tuple(removed))


def decide(songs: Sequence[Song], request: PrepareRequest, encoders: Encoders, vae: str) -> None:
    """Decide for each song what has to be made anew."""
    for song in songs:
        before = song.before
        if before is None:
            song.make = ALL
            continue
        if request.renew:
            same = before.get("latents") == song.digest
        else:
            sound = song.sound
            same = (sound.get("audio"), sound.get("vae"), sound.get("longest")) == (song.digest, vae, request.longest)
        words = asdict(words_of(song.text, int(before.get("frames", 0))))
        told = tuple(before.get(key) for key in ("form", "model", "encoders", "words", "trigger"))
        if not same:
            song.make = ALL
        elif told != (request.conditions, encoders.model, encoders.hash, words, song.text.trigger):
            song.make = CONDITIONS
        else:
            song.make = NOTHING


def check_apart(request: PrepareRequest) -> None:
    """Refuse an output folder that is the source, or in it. Raises Refusal."""
    source, output = request.source.resolve(), request.output.resolve()
    if output == source:
        raise Refusal(f"--output {request.output} is the folder that is read. Choose another folder for the songs.")
    if not source.is_dir():
        kind = "finished songs" if request.renew else "audio files"
        raise Refusal(f"No folder {request.source}. Expected a folder of {kind}.")


def _audio(request: PrepareRequest, look: bool) -> tuple[list[Song], list[str]]:
    found = audio_files(request.source)
    audio = [file for file in found.audio if not file.resolve().is_relative_to(request.output.resolve())]
    texts = find_texts(
        request.source,
        audio,
        dataset=request.dataset,
        trigger=request.trigger,
        as_typed=request.as_typed,
        language=request.language,
    )
    names = song_names(request.source, audio)
    songs = []
    for file in audio:
        text, target = texts.songs[file], request.output / f"{names[file]}.pt"
        song = Song(file, _told_from(request.source, file), target, text, 0.0, "")
        try:
            song.digest = hash_of(file)
        except OSError as error:
            song.unusable = f"cannot be read ({error.strerror or error})"
        song.before = _record_at(target)
        if song.before is not None and song.sound.get("audio") == song.digest and not (look or request.strict):
            song.seconds = float(song.sound.get("seconds", 0.0))
        elif not song.unusable:
            facts = look_at(file)
            song.seconds, song.unusable = min(facts.seconds, request.longest), facts.unusable
            song.problems += facts.problems
            song.notes += facts.notes
            if facts.seconds > request.longest:
                song.problems.append(
                    f"{facts.seconds:.0f} seconds long, of which the first {request.longest:g} are used"
                )
        song.problems += text.problems
        song.notes += text.changes
        songs.append(song)
    return songs, [*found.notes, *texts.notes]


def _finished(request: PrepareRequest) -> tuple[list[Song], list[str]]:
    files = songs_in(request.source)
    if not files:
        raise Refusal(
            f"No songs in {request.source}: expected .pt files from ACE-Step's preprocessing, or from prepare."
        )
    known: dict[Path, Mapping[str, Any]] = {}
    broken: dict[Path, str] = {}
    for file in files:
        _, problem = read_song(file)
        if problem:
            broken[file] = problem
            continue
        metadata = load_song(file).get("metadata")
        known[file] = metadata if isinstance(metadata, Mapping) else {}
    texts = find_texts(
        request.source,
        files,
        dataset=request.dataset,
        trigger=request.trigger,
        as_typed=request.as_typed,
        known=known,
        texts=request.texts,
        language=request.language,
    )
    names = song_names(request.source, files)
    songs = []
    for file in files:
        text, target = texts.songs[file], request.output / f"{names[file]}.pt"
        seconds = frames_in(file) / FRAMES_A_SECOND
        song = Song(file, _told_from(request.source, file), target, text, seconds, "", _record_at(target))
        song.unusable = broken.get(file, "")
        if not song.unusable:
            song.digest = hash_of_tensor(load_song(file)["target_latents"][: frames_in(file)])
            if any(bad.tensor == "target_latents" and not bad.hidden for bad in not_finite_in(file)):
                song.unusable = "its latents hold values that are not finite (NaN or infinity); prepare it from audio"
            said = known[file].get("preprocess_mode")
            if said == "lokr":
                song.notes.append("was preprocessed in the LoKr mode, with its own audio in its context: mended")
        song.problems += text.problems
        song.notes += text.changes
        songs.append(song)
    return songs, list(texts.notes)


def _told_from(folder: Path, file: Path) -> str:
    """A file's path from a folder, with slashes; its name alone where it lies elsewhere."""
    try:
        return file.relative_to(folder).as_posix()
    except ValueError:
        return file.name


def _record_at(file: Path) -> Mapping[str, Any] | None:
    """What a file that is there says about how it was made; None for one that cannot be read, or is no song."""
    song, problem = read_song(file)
    return None if problem else record_in(song.get("metadata"))


def _compare_with_output(request: PrepareRequest, songs: Sequence[Song]) -> list[str]:
    """Songs in the output folder that belong to nothing any more. Raises Refusal for songs that are not ours."""
    if not request.output.is_dir():
        return []
    ours = {song.file.name for song in songs}
    removed, foreign = [], []
    for file in sorted(request.output.glob("*.pt")):
        if file.name.startswith("."):
            continue
        if _record_at(file) is None and not _half_written(file):
            foreign.append(file.name)
        elif file.name not in ours:
            removed.append(file.name)
    if foreign:
        names = ", ".join(shown(name, 80) for name in foreign[:_MOST])
        more = f" and {len(foreign) - _MOST} more" if len(foreign) > _MOST else ""
        raise Refusal(
            f"{request.output} holds songs that prepare has not made: {names}{more}. Choose another --output for the "
            f"songs. Songs from ACE-Step's own preprocessing get conditions as generated by --renew {request.output}."
        )
    return removed


def _half_written(file: Path) -> bool:
    """Whether a file is no song at all, such as one that a full disk has cut: it is made again."""
    return bool(read_song(file)[1])
