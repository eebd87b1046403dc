"""Reads audio files: which there are, what they are like, their samples as upstream's preprocessing has them.

As upstream: one channel is doubled, of more than two the first two are taken, values beyond -1 to 1 stay, and other
rates are resampled by torchaudio. Readers are soundfile, torchaudio, ffmpeg and, for plain WAV files, Python itself:
whichever is there. Where none can read a file, the message names what is missing.
"""

from __future__ import annotations

import importlib
import os
import shutil
import struct
import subprocess
import tempfile
import wave
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

from ..errors import Refusal
from ..files import is_companion, not_a_file
from ..text import counted, listed, shown

if TYPE_CHECKING:
    import torch

RATE: Final = 48_000  # samples per second of what the VAE takes

LOSSLESS: Final = frozenset({".wav", ".wave", ".flac", ".aiff", ".aif"})
"""Endings of files that every reader decodes to the same samples."""

AUDIO: Final = LOSSLESS | {".mp3", ".ogg", ".oga", ".opus", ".m4a", ".aac", ".wma"}
"""Endings of files that are taken for audio."""

_OTHERS: Final = frozenset(
    {".mp4", ".mkv", ".webm", ".mov", ".mid", ".midi", ".m4p", ".amr", ".ape", ".wv", ".dsf", ".caf"}
)
_FRAME: Final = 1920  # samples of one frame of latents, which the VAE needs at least
_SHORTEST: Final = 10.0  # seconds, upstream's limits of generated songs
_LONGEST: Final = 600.0
_SILENT: Final = 1e-3  # largest sample, -60 dB
_FULL: Final = 0.9999
_CLIPPED: Final = 1e-3  # share of samples
_BLOCK: Final = 2**19  # frames


@dataclass(frozen=True)
class AudioFiles:
    """The audio in a folder and the folders in it, sorted by path, and lines about what is not read."""

    audio: tuple[Path, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class AudioFacts:
    """What an audio file is like."""

    file: Path
    seconds: float = 0.0  # length; 0 when it cannot be read
    # rate, channels: as stored; the rate in samples per second.
    rate: int = 0
    channels: int = 0
    peak: float = 0.0  # largest absolute value of all samples; above 1 is possible in files of floats and in lossy ones
    clipped: float = 0.0  # share of the samples, 0 to 1, that stand at full scale next to another such sample
    reader: str = ""  # what read it
    unusable: str = ""  # why no song can be made of it, "" when one can
    problems: tuple[str, ...] = ()  # what is told, and refused by ``--strict``
    notes: tuple[str, ...] = ()  # what is told only: what happens to channels, rate and loud samples


@dataclass(frozen=True)
class Audio:
    """The samples of a file."""

    samples: torch.Tensor  # float32 [2, N] at 48 kHz, on the CPU; not limited to -1 to 1
    seconds: float  # length of the whole file, also where `samples` were cut
    how: str  # what read and resampled it, such as "soundfile, resampled from 44100 Hz by torchaudio"


@dataclass(frozen=True)
class _Stream:
    """An opened file: its blocks are float32 [channels, frames]."""

    rate: int
    channels: int
    blocks: Iterator[torch.Tensor]


def audio_files(folder: Path) -> AudioFiles:
    """Find the audio in a folder and the folders in it. Hidden files and folders, and macOS's companions, are no audio.

    Raises Refusal without a folder, or audio in it; it says what there is instead.
    """
    if not folder.is_dir():
        raise Refusal(f"No folder {folder}. Expected a folder of audio files.")
    audio: list[Path] = []
    passed: list[Path] = []
    closed: list[str] = []
    songs = 0
    for place, folders, names in os.walk(folder, onerror=lambda error: closed.append(str(error.filename))):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__MACOSX")
        for name in names:
            ending = Path(name).suffix.lower()
            if not name.startswith(".") and not is_companion(name):
                songs += ending == ".pt"
                kind = audio if ending in AUDIO else passed if ending in _OTHERS else None
                if kind is not None:
                    kind.append(Path(place, name))
    notes = []
    if passed:
        others = listed(sorted(str(file.relative_to(folder)) for file in passed))
        notes.append(f"Not read as audio, by the ending: {others}. Save the sound as WAV, FLAC or MP3")
    if closed:
        notes.append(f"Folders that could not be listed: {listed(sorted(closed))}")
    if not audio:
        instead = "".join(f" {note}." for note in notes)
        if songs:
            are = "is" if songs == 1 else "are"
            instead = f" It has {counted(songs, 'song')} that {are} prepared (.pt): use acestep-train songs."
        raise Refusal(f"No audio in {folder}: expected {', '.join(sorted(ending[1:] for ending in AUDIO))}.{instead}")
    return AudioFiles(tuple(sorted(audio, key=lambda file: file.relative_to(folder).as_posix())), tuple(notes))


def look_at(file: Path) -> AudioFacts:
    """Read an audio file in blocks and tell what it is like. Raises nothing: `unusable` says why it cannot be read."""
    import torch

    frames, peak, full, finite = 0, 0.0, 0, True
    before: torch.Tensor | None = None
    try:
        with _reading(file, exact=False) as (stream, reader):
            for block in stream.blocks:
                frames += block.shape[1]
                if not block.numel():
                    continue
                size = block.abs()
                finite = finite and bool(torch.isfinite(block.sum()))
                peak = max(peak, float(size.max()))
                loud = size >= _FULL
                if before is not None:
                    loud = torch.cat([before, loud], dim=1)
                full += int((loud[:, 1:] & loud[:, :-1]).sum())
                before = loud[:, -1:]
    except Refusal as problem:
        return AudioFacts(file, unusable=str(problem))
    seconds = frames / stream.rate
    clipped = full / max(1, frames * stream.channels)
    unusable, problems, notes = "", [], []
    if not finite:
        unusable = f"{file.name} holds samples that are no numbers (NaN or infinity). Export it again."
    elif frames * RATE // stream.rate < _FRAME:
        unusable = f"{file.name} has {seconds:.3f} seconds, and the VAE needs 0.04 at least."
    elif seconds < _SHORTEST:
        problems.append(f"{seconds:.1f} seconds, and the model generates {_SHORTEST:.0f} at least")
    elif seconds > _LONGEST:
        problems.append(f"{seconds:.0f} seconds, and the model generates {_LONGEST:.0f} at most")
    if not unusable and peak < _SILENT:
        problems.append("silent: no sample is louder than -60 dB")
    if clipped > _CLIPPED:
        problems.append(f"clipped: {100 * clipped:.1f} % of the samples stand at full scale")
    if peak > 1.0:
        notes.append(f"samples up to {peak:.2f} stay as they are, beyond full scale")
    if stream.channels == 1:
        notes.append("mono: the channel is doubled")
    elif stream.channels > 2:
        notes.append(f"{stream.channels} channels: the first two are taken")
    if stream.rate != RATE:
        notes.append(f"{stream.rate} Hz, resampled to {RATE}")
        if stream.rate < 32_000:
            problems.append(f"{stream.rate} Hz: nothing above {stream.rate / 2000:g} kHz is in it")
    return AudioFacts(
        file, seconds, stream.rate, stream.channels, peak, clipped, reader, unusable, tuple(problems), tuple(notes)
    )


def read_audio(file: Path, *, seconds: float | None = None) -> Audio:
    """The samples of an audio file, as upstream's preprocessing takes them; with `seconds` so much from the beginning.

    Lossless files are read by soundfile first, others by torchaudio first, as upstream reads them. What is not taken is
    still counted. Raises Refusal if nothing that is installed can read it, or resample it, or if it is empty.
    """
    import torch

    blocks: list[torch.Tensor] = []
    frames = 0
    with _reading(file, exact=True) as (stream, reader):
        wanted = None
        if seconds is not None:
            wanted = round((seconds + 1.0) * stream.rate)  # resampling looks a little ahead
        for block in stream.blocks:
            if wanted is None or frames < wanted:
                blocks.append(block if wanted is None else block[:, : wanted - frames])
            frames += block.shape[1]
    if not frames:
        raise Refusal(f"{file} holds no sound. Save it again, or take it out of the folder.")
    samples, how = torch.cat(blocks, dim=1), reader
    if stream.rate != RATE:
        samples, by = _resampled(samples, stream.rate, file)
        how += f", resampled from {stream.rate} Hz by {by}"
    samples = samples.expand(2, -1) if samples.shape[0] == 1 else samples[:2]
    if seconds is not None:
        samples = samples[:, : int(seconds * RATE)]
    return Audio(samples.contiguous(), frames / stream.rate, how)


# -- readers ----------------------------------------------------------------------------------------------------------


class _Missing(Exception):
    """A reader is not there; the message names what is missing."""


@contextmanager
def _reading(file: Path, *, exact: bool) -> Iterator[tuple[_Stream, str]]:
    """An opened file, and what reads it. Raises Refusal, also for a file that turns out to be damaged in the block."""
    try:
        with ExitStack() as stack:
            yield _opened(file, stack, exact=exact)
    except Refusal:
        raise
    except Exception as error:  # each reader has its own types for a damaged file
        reason = shown(_reason(error), 120)
        raise Refusal(f"{file} is damaged ({reason}). Save it again, or take it out of the folder.") from None


def _opened(file: Path, stack: ExitStack, *, exact: bool) -> tuple[_Stream, str]:
    """The first reader that can read a file. Raises Refusal with what each of them said."""
    try:
        if problem := not_a_file(file):
            raise Refusal(f"{file} {problem}, expected an audio file.")
        with file.open("rb") as raw:
            head = raw.read(64)
    except OSError as error:
        raise Refusal(f"{file} cannot be read ({error.strerror}).") from None
    if no_audio := _no_audio(head):
        raise Refusal(f"{file} {no_audio[0]}, expected audio. {no_audio[1]}")
    readers: list[tuple[str, Callable[[Path], Any]]] = [
        ("soundfile", _by_soundfile),
        ("torchaudio", _by_torchaudio),
        ("ffmpeg", _by_ffmpeg),
        ("Python's own wave", _by_wave),
    ]
    if exact and file.suffix.lower() not in LOSSLESS:
        readers[:2] = reversed(readers[:2])
    said: list[str] = []
    for name, reader in readers:
        try:
            return stack.enter_context(reader(file)), name
        except _Missing as problem:
            said.append(str(problem))
        except Exception as error:  # each reader has its own types for a file that it cannot read
            reason = _reason(error).replace(str(file), file.name)
            said.append(f"{name} cannot read it ({shown(reason, 120)})")
    missing = any(one.endswith("is not there") for one in said)
    advice = "install what is missing; ffmpeg reads every kind" if missing else "take it out of the folder"
    raise Refusal(
        f"{file} cannot be read, expected audio: {'; '.join(said)}. Export it again as WAV or FLAC, or {advice}."
    )


def _reason(error: Exception) -> str:
    first = str(error).strip().splitlines()
    return first[0] if first else type(error).__name__


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:  # a package that is there may fail to load its libraries in any way
        reason = "is not there" if isinstance(error, ModuleNotFoundError) else f"cannot be imported ({_reason(error)})"
        raise _Missing(f"{name} {reason}") from None


@contextmanager
def _by_soundfile(file: Path) -> Iterator[_Stream]:
    import torch

    package = _package("soundfile")
    with package.SoundFile(str(file)) as opened:

        def blocks() -> Iterator[torch.Tensor]:
            while len(block := opened.read(_BLOCK, dtype="float32", always_2d=True)):
                yield torch.from_numpy(block.T.copy())

        yield _Stream(int(opened.samplerate), int(opened.channels), blocks())


@contextmanager
def _by_torchaudio(file: Path) -> Iterator[_Stream]:
    package = _package("torchaudio")
    try:
        samples, rate = package.load(str(file))
    except ImportError as error:  # newer versions read every kind through torchcodec
        name = "torchcodec" if "torchcodec" in str(error).lower() else "a part of it"
        raise _Missing(f"torchaudio is there, but {name} is not there") from None
    yield _Stream(int(rate), samples.shape[0], iter([samples.float()]))


@contextmanager
def _by_ffmpeg(file: Path) -> Iterator[_Stream]:
    import torch

    program = shutil.which("ffmpeg")
    if program is None:
        raise _Missing("ffmpeg is not there")
    command = [program, "-v", "error", "-nostdin", "-i", str(file.absolute()), "-map", "0:a:0"]
    command += ["-c:a", "pcm_f32le", "-f", "wav", "-"]
    with (
        tempfile.TemporaryFile() as errors,  # a pipe that nobody empties could stop the program
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors) as process,
    ):
        out = process.stdout
        assert out is not None

        def failed() -> RuntimeError:
            process.wait()
            errors.seek(0)
            return RuntimeError(errors.read(2000).decode("utf-8", "replace").strip() or "it has no sound")

        def blocks() -> Iterator[torch.Tensor]:
            size = 4 * channels
            while raw := out.read(_BLOCK * size):
                values = torch.frombuffer(bytearray(raw[: len(raw) // size * size]), dtype=torch.float32)
                yield values.view(-1, channels).T.contiguous()
            if process.wait():
                raise failed()

        try:
            channels, rate = _wav_header(out)
        except ValueError:
            raise failed() from None
        try:
            yield _Stream(rate, channels, blocks())
        finally:
            process.kill()


def _wav_header(stream: IO[bytes]) -> tuple[int, int]:
    """Channels and rate of a WAV stream, read up to its samples. Raises ValueError."""
    if stream.read(12)[:4] != b"RIFF":
        raise ValueError
    channels = rate = 0
    while len(head := stream.read(8)) == 8:
        name, size = head[:4], struct.unpack("<I", head[4:])[0]
        if name == b"data" and channels and rate:
            return channels, rate
        content = stream.read(size + size % 2)
        if name == b"fmt ":
            channels, rate = struct.unpack("<HI", content[2:8])
    raise ValueError


@contextmanager
def _by_wave(file: Path) -> Iterator[_Stream]:
    import torch

    with wave.open(str(file), "rb") as opened:
        width, channels = opened.getsampwidth(), opened.getnchannels()
        if width not in (1, 2, 3, 4):
            raise ValueError(f"{8 * width} bits a sample")

        def blocks() -> Iterator[torch.Tensor]:
            while raw := opened.readframes(_BLOCK):
                raw = raw[: len(raw) // (width * channels) * width * channels]
                if width == 3:  # the missing lowest byte is zero
                    raw = b"".join(b"\0" + raw[at : at + 3] for at in range(0, len(raw), 3))
                kind = {1: torch.uint8, 2: torch.int16, 3: torch.int32, 4: torch.int32}[width]
                values = torch.frombuffer(bytearray(raw), dtype=kind).to(torch.float64)
                values = (values - 128) / 128 if width == 1 else values / (2.0**15 if width == 2 else 2.0**31)
                yield values.float().view(-1, channels).T.contiguous()

        yield _Stream(opened.getframerate(), channels, blocks())


def _resampled(samples: torch.Tensor, rate: int, file: Path) -> tuple[torch.Tensor, str]:
    """Samples at 48 kHz, and by what."""
    try:
        return _package("torchaudio.transforms").Resample(rate, RATE)(samples), "torchaudio"
    except _Missing:
        pass
    try:
        signal = _package("scipy.signal")
    except _Missing:
        raise Refusal(
            f"{file} has {rate} Hz, the VAE takes {RATE}, and torchaudio, which resamples, is not there. Install "
            f"torchaudio, or save the file with {RATE} Hz."
        ) from None
    import torch

    ratio = Fraction(RATE, rate)
    resampled = signal.resample_poly(samples.numpy(), ratio.numerator, ratio.denominator, axis=1)
    return torch.from_numpy(resampled).float(), "scipy, because torchaudio is not there"


def _no_audio(head: bytes) -> tuple[str, str] | None:
    """What a file is that has an audio's name and holds something else, by its first bytes, and what to do about it."""
    start = head.lstrip().lower()
    if not head:
        return "is empty", "Copy it again, or take it out of the folder."
    if head.startswith(b"version https://git-lfs.github.com/spec"):
        return "is a pointer of Git LFS and not the file itself", "Fetch it: git lfs pull."
    if start.startswith((b"<!doctype", b"<html")):
        return "is a web page", "Download it again."
    if head.startswith(b"PK\x03\x04"):
        return "is a ZIP archive", "Unpack it."
    return None
