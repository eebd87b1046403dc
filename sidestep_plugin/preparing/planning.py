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
from ..songs.one_song import frames_in, load_song, metadata_in, read_song
from ..songs.song_names import song_names, told_from
from ..songs.song_text import SongText, find_texts
from ..songs.values import hash_of, not_finite_in
from ..text import counted, listed, shown
from .request import PrepareRequest

ALL: Final = "all"
CONDITIONS: Final = "conditions"
NOTHING: Final = "nothing"


@dataclass
class Song:
    """A song that is to be prepared."""

    # source, name: the audio, or the finished song that is renewed, and its path from its folder, with slashes.
    source: Path
    name: str
    file: Path  # the file that it becomes
    text: SongText  # what the model is told
    seconds: float = 0.0  # length of the song, as far as it is known before encoding
    digest: str = ""  # SHA-256 of the audio file; of the latents of a finished song
    # What the file that is there says about how it was made; None where there is none.
    before: Mapping[str, Any] | None = None
    make: str = ALL  # "all", "conditions" or "nothing"
    # What is missing or odd, and what is used instead; ``--strict`` refuses them.
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what is told only
    unusable: str = ""  # why no song can be made of it, "" when one can

    @property
    def sound(self) -> Mapping[str, Any]:
        """Where the latents of the file that is there come from."""
        found = (self.before or {}).get("sound")
        return found if isinstance(found, Mapping) else {}


@dataclass(frozen=True)
class Plan:
    """The songs of a folder, lines about it, and names of songs in the output folder whose source is gone."""

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
    """Look at the songs and at what is in the output folder; with `look` at the sound of finished songs, too.

    Raises Refusal if there are no songs, for texts that cannot be read, for other people's songs in the output folder,
    and, with ``--strict``, for songs with problems.
    """
    check_apart(request)
    songs, notes = _finished(request) if request.renew else _audio(request, look)
    for song in songs:
        song.problems += song.text.problems
        song.notes += song.text.changes
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
    songs, notes = _with_texts(request, audio)
    for song in songs:
        try:
            song.digest = hash_of(song.source)
        except OSError as error:
            song.unusable = f"cannot be read ({error.strerror or error})"
        if song.before is not None and song.sound.get("audio") == song.digest and not (look or request.strict):
            song.seconds = float(song.sound.get("seconds", 0.0))
        elif not song.unusable:
            facts = look_at(song.source)
            song.seconds, song.unusable = min(facts.seconds, request.longest), facts.unusable
            song.problems += facts.problems
            song.notes += facts.notes
            if facts.seconds > request.longest:
                used = f"of which the first {request.longest:g} are used"
                song.problems.append(f"{facts.seconds:.0f} seconds long, {used}")
    return songs, [*found.notes, *notes]


def _finished(request: PrepareRequest) -> tuple[list[Song], list[str]]:
    files = songs_in(request.source)
    if not files:
        raise Refusal(
            f"No songs in {request.source}: expected .pt files from ACE-Step's preprocessing, or from prepare."
        )
    read = {file: read_song(file) for file in files}
    known = {file: metadata_in(tensors) for file, (tensors, problem) in read.items() if not problem}
    songs, notes = _with_texts(request, files, known)
    for song in songs:
        song.unusable = read[song.source][1]
        if not song.unusable:
            frames = frames_in(song.source)
            song.seconds = frames / FRAMES_A_SECOND
            song.digest = hash_of_tensor(load_song(song.source)["target_latents"][:frames])
            if any(bad.tensor == "target_latents" and not bad.hidden for bad in not_finite_in(song.source)):
                song.unusable = "its latents hold values that are not finite (NaN or infinity); prepare it from audio"
            if known[song.source].get("preprocess_mode") == "lokr":
                song.notes.append("was preprocessed in the LoKr mode, with its own audio in its context: mended")
    return songs, list(notes)


def _with_texts(
    request: PrepareRequest, files: Sequence[Path], known: Mapping[Path, Mapping[str, Any]] | None = None
) -> tuple[list[Song], Sequence[str]]:
    """The songs of some files, of whose sound nothing is known yet, and lines about the folder of their texts."""
    texts = find_texts(
        request.source,
        files,
        dataset=request.dataset,
        trigger=request.trigger,
        as_typed=request.as_typed,
        known=known,
        texts=None if known is None else request.texts,
        language=request.language,
    )
    names = song_names(request.source, files)
    songs = []
    for file in files:
        name, target = told_from(request.source, file).as_posix(), request.output / f"{names[file]}.pt"
        songs.append(Song(file, name, target, texts.songs[file], before=_record_at(target)))
    return songs, texts.notes


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
        # What is no song at all, such as a file that a full disk has cut, is made again.
        if _record_at(file) is None and not read_song(file)[1]:
            foreign.append(file.name)
        elif file.name not in ours:
            removed.append(file.name)
    if foreign:
        raise Refusal(
            f"{request.output} holds songs that prepare has not made: {listed(foreign)}. Choose another --output for "
            "the songs. Songs from ACE-Step's own preprocessing get conditions as generated by --renew "
            f"{request.output}."
        )
    return removed
