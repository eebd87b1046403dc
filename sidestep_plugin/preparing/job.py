"""Prepares songs: loads what is needed, encodes song by song, and writes each song whole.

Whatever ends the job, finished songs stay and are not made again. Two runs write the same bytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..engine.models import pick_device, restrict_gpus
from ..engine.song_encoding import (
    Encoded,
    Words,
    attention_on,
    dtype_on,
    encode,
    encode_as_upstream,
    encode_audio,
    import_handler,
    load_condition_encoder,
    load_text_encoder,
    load_tokenizer,
    make_handler,
)
from ..engine.song_files import (
    UPSTREAM,
    Encoders,
    Machine,
    Sound,
    hash_of_weights,
    manifest_of,
    record_of,
    song_of,
    words_of,
    write_json,
    write_song,
)
from ..engine.writable import check_writable
from ..errors import Refusal, UpstreamMismatch
from ..previews.conditions import read_silence
from ..previews.decoding import load_vae
from ..previews.making import freed
from ..resuming.lock import OutputLock
from ..songs.audio import read_audio
from ..songs.one_song import frames_in, load_song
from ..text import counted, hours, minutes_and_seconds, shown
from .planning import ALL, CONDITIONS, NOTHING, Plan, Song, decide, plan
from .request import Places, PrepareRequest, Say, find_places, offline

if TYPE_CHECKING:
    import torch

_WAITING: Final = ".latents"
"""Folder in the output folder for latents that wait for their conditions, with ``--low-memory``."""


@dataclass(frozen=True)
class Done:
    """What a job has done: numbers of songs that were made, got new conditions, or were as they should be.

    Those that could not be made come with the reason; `removed` are files in the output folder whose source is gone.
    """

    made: int
    renewed: int
    kept: int
    failed: tuple[tuple[str, str], ...]
    removed: tuple[str, ...]


def prepare(request: PrepareRequest, say: Say, show: Callable[[Plan], None] | None = None) -> Done:
    """Prepare the songs of a folder, or renew finished ones; `show` gets the plan before anything is loaded.

    Raises Refusal and OSError, also KeyboardInterrupt. Songs that are finished by then stay.
    """
    offline()
    planned = plan(request)
    places = find_places(request)
    check_writable(request.output)
    with _locked(request.output):
        for place in (request.output, request.output / _WAITING):
            for left in place.glob(".*.tmp"):  # half written by a job that was killed; nobody else is writing now
                left.unlink(missing_ok=True)
        encoders = Encoders.of(places.model, places.text_encoder)
        vae = "" if places.vae is None else hash_of_weights(places.vae)
        decide(planned.usable, request, encoders, vae)
        if show is not None:
            show(planned)
        failed = {song.name: song.unusable for song in planned.songs if song.unusable}
        if planned.to_make:
            restrict_gpus(request.device)
            with closing(_Work(request, places, encoders, vae, pick_device(request.device), say)) as work:
                failed |= work.make(planned.to_make)
        _finish(request, places, planned, failed)
    made = [song for song in planned.usable if song.name not in failed]
    count = {kind: sum(song.make == kind for song in made) for kind in (ALL, CONDITIONS, NOTHING)}
    if request.renew:
        count[CONDITIONS] += count[ALL]
        count[ALL] = 0
    return Done(count[ALL], count[CONDITIONS], count[NOTHING], tuple(failed.items()), planned.removed)


@dataclass
class _Work:
    """The loaded parts, and what is done with them. Closing it gives their memory back."""

    request: PrepareRequest
    places: Places
    encoders: Encoders
    vae_hash: str
    device: torch.device
    say: Say
    vae: Any = None
    handler: Any = None

    def __post_init__(self) -> None:
        self.dtype, self.attention = dtype_on(self.device), attention_on(self.device)

    def close(self) -> None:
        self.vae = self.handler = None
        freed(self.device)

    def make(self, songs: Sequence[Song]) -> dict[str, str]:
        """Make songs in turn. Returns those that could not be made, with the reason."""
        failed: dict[str, str] = {}
        sounds = [song for song in songs if song.make == ALL and self.places.vae is not None]
        if self.request.low_memory and sounds:
            self._loaded_vae()
            clock = _Clock(sounds, self.say, "sound")
            for song in sounds:
                with _failing(song, failed), clock.song(song):
                    self._put_aside(song)
            self.vae = None
            freed(self.device)
        elif sounds:
            self._loaded_vae()
        self._loaded_handler()
        rest = [song for song in songs if song.name not in failed]
        clock = _Clock(rest, self.say, "conditions" if self.request.low_memory or self.request.renew else "")
        for song in rest:
            with _failing(song, failed), clock.song(song) as told:
                told += self._make(song)
        return failed

    def _make(self, song: Song) -> list[str]:
        """Make one song and write it. Returns what is worth telling."""
        latents, sound = self._latents(song)
        words = words_of(song.text, len(latents))
        encoded = self._encode(words, len(latents))
        machine = Machine.of(self.device.type, self.dtype, self.attention, self.places.root)
        record = record_of(self.request.conditions, self.encoders, encoded, words, song.text, latents, machine, sound)
        write_song(song.file, song_of(latents, encoded, song.text, self._origin(song), record))
        self._aside(song).unlink(missing_ok=True)
        told, lines = encoded.told, []
        if told.prompt_lost and self.request.conditions != UPSTREAM:
            lines.append(f"{counted(told.prompt_lost, 'token')} of the prompt are cut: shorten the caption")
        if told.lyrics_lost and self.request.conditions != UPSTREAM:
            lines.append(f"{counted(told.lyrics_lost, 'token')} of the lyrics are cut")
        return lines

    def _origin(self, song: Song) -> str:
        """The audio's path as the song tells it: never a local path."""
        if not self.request.renew:
            return song.name
        metadata = load_song(song.source).get("metadata") or {}
        said = str(metadata.get("audio_path") or metadata.get("filename") or song.name)
        prepared = "prepared" in metadata
        return said if prepared else said.replace("\\", "/").rpartition("/")[2]

    def _encode(self, words: Words, frames: int) -> Encoded:
        encoder = encode_as_upstream if self.request.conditions == UPSTREAM else encode
        encoded = encoder(self._loaded_handler(), words, frames)
        if not bool(encoded.encoder_hidden_states.isfinite().all()):
            raise Refusal(f"its conditions hold NaN or infinity on {self.device}. Try another --device, or cpu")
        return encoded

    def _latents(self, song: Song) -> tuple[torch.Tensor, dict[str, Any]]:
        """The latents of a song, shape [T,64], and where they come from."""
        if self.request.renew:
            old = load_song(song.source)
            prepared = (old.get("metadata") or {}).get("prepared") or {}
            latents = old["target_latents"][: frames_in(song.source)].clone()
            return latents, dict(prepared.get("sound") or {})
        if song.make == CONDITIONS:
            return load_song(song.file)["target_latents"].clone(), dict(song.sound)
        if (aside := self._put_aside_before(song)) is not None:
            return aside["target_latents"].clone(), dict(aside["sound"])
        return self._encode_sound(song)

    def _encode_sound(self, song: Song) -> tuple[torch.Tensor, dict[str, Any]]:
        audio = read_audio(song.source, seconds=self.request.longest)
        sound = Sound(song.digest, self.vae_hash, audio.samples.shape[1] / 48_000, self.request.longest, audio.how)
        latents = encode_audio(self._loaded_vae(), audio.samples, self.dtype, sound.seed)
        if not bool(latents.isfinite().all()):
            raise Refusal(f"its latents hold NaN or infinity on {self.device}. Try another --device, or cpu")
        return latents, asdict(sound)

    # -- low memory ---------------------------------------------------------------------------------------------------

    def _aside(self, song: Song) -> Path:
        return self.request.output / _WAITING / song.file.name

    def _put_aside(self, song: Song) -> None:
        if self._put_aside_before(song) is None:
            latents, sound = self._encode_sound(song)
            self._aside(song).parent.mkdir(exist_ok=True)
            write_song(self._aside(song), {"target_latents": latents, "sound": sound})

    def _put_aside_before(self, song: Song) -> dict[str, Any] | None:
        """What an interrupted job has put aside for a song, if it is still right."""
        try:
            found = load_song(self._aside(song))
            sound = found["sound"]
            wanted = (song.digest, self.vae_hash, self.request.longest)
            right = (sound["audio"], sound["vae"], sound["longest"]) == wanted
        except Exception:  # nothing there, or nothing that can be read
            return None
        return dict(found) if right else None

    # -- loading ------------------------------------------------------------------------------------------------------

    def _loaded_vae(self) -> Any:
        if self.vae is None:
            assert self.places.vae is not None
            self.say(f"Loading the VAE on {self.device} ...")
            self.vae = load_vae(self.places.vae, self.device)
        return self.vae

    def _loaded_handler(self) -> Any:
        if self.handler is None:
            handler_class = import_handler(self.places.root)
            self.say(f"Loading the encoders of {self.places.model.name} on {self.device} ...")
            self.handler = make_handler(
                handler_class,
                device=str(self.device),
                dtype=self.dtype,
                model=load_condition_encoder(self.places.model, self.device, self.dtype, self.attention),
                tokenizer=load_tokenizer(self.places.text_encoder),
                text_encoder=load_text_encoder(self.places.text_encoder, self.device, self.dtype),
                silence=read_silence(self.places.model),
            )
        return self.handler


class _Clock:
    """Tells after each song how far the job is, and how long the rest will take."""

    def __init__(self, songs: Sequence[Song], say: Say, what: str) -> None:
        self._all, self._say, self._what = len(songs), say, f" ({what})" if what else ""
        self._rest = sum(song.seconds for song in songs)
        self._number, self._done, self._spent = 0, 0.0, 0.0

    @contextmanager
    def song(self, song: Song) -> Iterator[list[str]]:
        """Time a song; lines that are put into the list are told with it."""
        began = time.monotonic()
        told: list[str] = []
        self._number += 1
        yield told
        took = time.monotonic() - began
        if self._number > 1 or self._all == 1:  # the first song includes the loading
            self._done += song.seconds
            self._spent += took
        self._rest -= song.seconds
        left = ""
        if self._done and self._number < self._all:
            left = f", about {hours(self._spent / self._done * self._rest)} left"
        length = minutes_and_seconds(song.seconds)
        self._say(f"{self._number}/{self._all} {shown(song.name, 80)}{self._what}: {length}, {took:.1f} s{left}")
        for line in told:
            self._say(f"  Note: {line}.")


@contextmanager
def _failing(song: Song, failed: dict[str, str]) -> Iterator[None]:
    """Note what goes wrong with one song, so that the others are made. What concerns all of them goes through."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise Refusal(
            f"Not enough GPU memory for {shown(song.name)} ({str(error).splitlines()[0][:200]}). Use --low-memory, "
            "which loads the VAE and the encoders one after the other, or --device cpu."
        ) from error
    except UpstreamMismatch:
        raise
    except (Refusal, RuntimeError, ValueError) as error:  # torch raises these for sounds that a model cannot take
        failed[song.name] = str(error) if isinstance(error, Refusal) else f"{type(error).__name__}: {error}"


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock = OutputLock(folder)
    try:
        lock.acquire()
    except Refusal as refusal:
        holder = str(refusal).partition("(")[2].partition(")")[0] or "its process is unknown"
        raise Refusal(
            f"Another program is preparing songs in {folder} ({holder}). Wait until it has ended, or choose another "
            "--output."
        ) from None
    with lock:
        yield


def _finish(request: PrepareRequest, places: Places, planned: Plan, failed: dict[str, str]) -> None:
    """Write what upstream and Side-Step read beside the songs: the list of finished songs comes last."""
    songs = [song for song in planned.usable if song.name not in failed]
    if not songs:
        return
    triggers = {(song.text.trigger, song.text.position) for song in songs}
    shared = songs[0].text if len(triggers) == 1 else None
    waiting = request.output / _WAITING
    if waiting.is_dir() and not any(waiting.iterdir()):
        waiting.rmdir()
    write_json(
        request.output / "preprocess_meta.json", {"model_variant": places.model.name, "prepared_by": "sidestep-plugin"}
    )
    write_json(request.output / "manifest.json", manifest_of([song.file.name for song in songs], shared))
