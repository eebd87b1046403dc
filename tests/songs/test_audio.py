"""Audio files: which are read, what is said about each, and which samples come out."""

import importlib
import os
import struct
import sys
import wave
from types import ModuleType

import pytest
import torch
from wav_files import tone, write_wav

from sidestep_plugin import Refusal
from sidestep_plugin.songs import audio
from sidestep_plugin.songs.audio import audio_files, look_at, read_audio


@pytest.fixture(autouse=True)
def _no_package_and_no_program(monkeypatch, request):
    """Unless a test brings its own: what it finds must not depend on the machine."""
    if not {"packages", "ffmpeg"} & set(request.fixturenames):
        without(monkeypatch, "soundfile", "torchaudio")
        monkeypatch.setattr(audio.shutil, "which", lambda name: None)


def without(monkeypatch, *names):
    real = importlib.import_module

    def import_module(name, *arguments):
        if name.partition(".")[0] in names:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *arguments)

    monkeypatch.setattr(audio.importlib, "import_module", import_module)


# -- which files -------------------------------------------------------------------------------------------------------


def test_audio_is_found_in_all_folders_in_the_order_of_its_paths(tmp_path):
    for name in ("b.wav", "a/z.MP3", "a/y.flac", "A.m4a", "c.ogg", "d.opus", "e.aac", "f.aif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    found = [file.relative_to(tmp_path).as_posix() for file in audio_files(tmp_path).audio]
    assert found == ["A.m4a", "a/y.flac", "a/z.MP3", "b.wav", "c.ogg", "d.opus", "e.aac", "f.aif"]


def test_hidden_files_and_those_that_belong_to_a_song_are_no_audio(tmp_path):
    for name in ("a.wav", ".b.wav", "._a.wav", ".hidden/c.wav", "__MACOSX/d.wav", "a.txt", "a.wav.bak", "a.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert audio_files(tmp_path).audio == (tmp_path / "a.wav",)


def test_a_file_with_sound_in_it_that_is_not_read_is_named(tmp_path):
    for name in ("a.wav", "clip.mp4", "song.mid"):
        (tmp_path / name).write_bytes(b"x")
    assert audio_files(tmp_path).notes == (
        "Not read as audio, by the ending: clip.mp4, song.mid. Save the sound as WAV, FLAC or MP3",
    )


@pytest.mark.parametrize(
    ("name", "says"),
    [("a.pt", "1 song that is prepared"), ("a.mp4", "a.mp4"), ("a.txt", "flac")],
)
def test_a_folder_without_audio_says_what_is_there_instead(name, says, tmp_path):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(Refusal, match=rf"No audio in .*{says}"):
        audio_files(tmp_path)


def test_no_folder_and_a_file_in_its_place(tmp_path):
    (tmp_path / "a.wav").write_bytes(b"x")
    for place in (tmp_path / "nowhere", tmp_path / "a.wav"):
        with pytest.raises(Refusal, match=r"No folder .*Expected a folder of audio"):
            audio_files(place)


# -- what is said ------------------------------------------------------------------------------------------------------


def test_a_good_file_has_nothing_to_say(tmp_path):
    facts = look_at(write_wav(tmp_path / "a.wav", 10.0))
    assert (facts.seconds, facts.rate, facts.channels, facts.unusable, facts.problems, facts.notes) == (
        10.0, 48_000, 2, "", (), (),
    )  # fmt: skip
    assert facts.peak == pytest.approx(0.5, abs=1e-3) and facts.clipped == 0.0


BAD = {
    "half a second": ({"seconds": 0.5}, "0.5 seconds, and the model generates 10 at least"),
    "silence": ({"seconds": 10, "sound": lambda second: 0.0}, "silent: no sample is louder than -60 dB"),
    "nearly silence": ({"seconds": 10, "sound": tone(5e-4)}, "silent"),
    "clipped": ({"seconds": 10, "sound": tone(2.0)}, "clipped: 65"),
    "8 kHz": ({"seconds": 10, "rate": 8000}, "8000 Hz: nothing above 4 kHz is in it"),
}


@pytest.mark.parametrize("bad", BAD)
def test_what_looks_wrong_is_told(bad, tmp_path):
    options, says = BAD[bad]
    facts = look_at(write_wav(tmp_path / "a.wav", **options))
    assert not facts.unusable and [problem for problem in facts.problems if says in problem]


def test_a_file_that_only_touches_full_scale_is_not_clipped(tmp_path):
    assert not look_at(write_wav(tmp_path / "a.wav", 10.0, sound=tone(1.0))).problems


def test_more_than_ten_minutes_are_read_in_blocks_and_told(tmp_path, monkeypatch):
    monkeypatch.setattr(audio, "_LONGEST", 11.0)
    monkeypatch.setattr(audio, "_BLOCK", 1000)
    facts = look_at(write_wav(tmp_path / "a.wav", 12.0, rate=2000))
    assert facts.seconds == 12.0 and any("the model generates 11 at most" in problem for problem in facts.problems)


@pytest.mark.parametrize(
    ("options", "note"),
    [
        ({"channels": 1}, "mono: the channel is doubled"),
        ({"channels": 6}, "6 channels"),
        ({"rate": 44_100}, "44100 Hz"),
    ],
)
def test_what_happens_to_channels_and_rate_is_told(options, note, tmp_path):
    facts = look_at(write_wav(tmp_path / "a.wav", 10.0, **options))
    assert not facts.problems and any(note in one for one in facts.notes)


def test_clipping_is_found_across_blocks(tmp_path, monkeypatch):
    file = write_wav(tmp_path / "a.wav", 0.1, sound=tone(2.0))
    whole = look_at(file).clipped
    monkeypatch.setattr(audio, "_BLOCK", 7)
    assert look_at(file).clipped == whole > 0.5


# -- what no song can be made of ---------------------------------------------------------------------------------------

UNREADABLE = {
    "nothing": ("a.mp3", b"", "is empty"),
    "a pointer": ("a.wav", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
    "a web page": ("a.mp3", b"\n<!DOCTYPE html><html>", "is a web page"),
    "an archive": ("a.wav", b"PK\x03\x04\x14", "is a ZIP archive"),
    "text": ("a.wav", b"this is a text about a song", "expected audio: soundfile is not there"),
    "half a header": ("a.wav", b"RIFF\x24\x00\x00\x00WAVEfmt ", "expected audio"),
    "another ending": ("a.wav", b"ID3\x04\x00\x00\x00", "ffmpeg reads every kind"),
}


@pytest.mark.parametrize("bad", UNREADABLE)
def test_a_file_that_is_no_audio_is_named_with_what_to_do(bad, tmp_path):
    name, content, says = UNREADABLE[bad]
    (tmp_path / name).write_bytes(content)
    facts = look_at(tmp_path / name)
    assert str(tmp_path / name) in facts.unusable and says in facts.unusable and facts.seconds == 0.0
    with pytest.raises(Refusal, match=name):
        read_audio(tmp_path / name)


def test_every_reader_that_is_missing_is_named(tmp_path):
    (tmp_path / "a.m4a").write_bytes(b"\0\0\0\x20ftypM4A ")
    reason = "Python's own wave cannot read it (file does not start with RIFF id)"
    said = look_at(tmp_path / "a.m4a").unusable
    assert f"expected audio: soundfile is not there; torchaudio is not there; ffmpeg is not there; {reason}. " in said
    assert said.endswith("or install what is missing; ffmpeg reads every kind.")


@pytest.mark.parametrize("seconds", [0.0, 0.01, 0.039])
def test_a_file_shorter_than_one_frame_of_latents_is_unusable(seconds, tmp_path):
    facts = look_at(write_wav(tmp_path / "a.wav", seconds))
    assert "the VAE needs 0.04 at least" in facts.unusable


def test_a_file_without_a_sample_is_refused(tmp_path):
    with pytest.raises(Refusal, match="holds no sound"):
        read_audio(write_wav(tmp_path / "a.wav", 0.0))


def test_a_folder_named_like_a_song_and_a_file_that_is_gone(tmp_path):
    (tmp_path / "a.wav").mkdir()
    assert "is a folder" in look_at(tmp_path / "a.wav").unusable
    assert "is not there" in look_at(tmp_path / "b.wav").unusable


# -- samples -----------------------------------------------------------------------------------------------------------


def test_samples_are_float_stereo_at_48_khz(tmp_path):
    found = read_audio(write_wav(tmp_path / "a.wav", 0.5, channels=1))
    assert found.samples.shape == (2, 24_000) and found.samples.dtype == torch.float32
    assert torch.equal(found.samples[0], found.samples[1]) and found.how == "Python's own wave"
    assert float(found.samples[0, 1]) == round(tone()(1 / 48_000) * 2**15) / 2**15


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_every_width_of_samples_has_full_scale_at_one(width, tmp_path):
    found = read_audio(write_wav(tmp_path / "a.wav", 0.01, width=width, sound=lambda second: -1.0))
    assert float(found.samples.min()) == float(found.samples.max()) == -1.0
    half = read_audio(write_wav(tmp_path / "b.wav", 0.01, width=width, sound=lambda second: 0.5))
    assert float(half.samples[0, 0]) == 0.5


def test_of_more_than_two_channels_the_first_two_are_taken(tmp_path):
    with wave.open(str(tmp_path / "a.wav"), "wb") as opened:
        opened.setparams((3, 2, 48_000, 0, "NONE", ""))
        opened.writeframes(struct.pack("<3h", 8192, -8192, 16384) * 100)
    found = read_audio(tmp_path / "a.wav").samples
    assert found.shape == (2, 100) and found[:, 5].tolist() == [0.25, -0.25]


def test_the_beginning_of_a_long_file_is_what_is_kept(tmp_path):
    file = write_wav(tmp_path / "a.wav", 2.0)
    whole, cut = read_audio(file), read_audio(file, seconds=0.5)
    assert torch.equal(cut.samples, whole.samples[:, :24_000]) and cut.seconds == whole.seconds == 2.0


def test_another_rate_without_torchaudio_is_resampled_and_that_is_said(tmp_path):
    pytest.importorskip("scipy")
    found = read_audio(write_wav(tmp_path / "a.wav", 0.5, rate=24_000))
    assert found.samples.shape == (2, 24_000)
    assert found.how == "Python's own wave, resampled from 24000 Hz by scipy, because torchaudio is not there"
    expected = torch.tensor([tone()(number / 48_000) for number in range(24_000)])
    assert float((found.samples[0] - expected)[500:-500].abs().max()) < 1e-2


def test_another_rate_with_nothing_that_resamples_is_refused(tmp_path, monkeypatch):
    without(monkeypatch, "soundfile", "torchaudio", "scipy")
    with pytest.raises(Refusal, match=r"has 44100 Hz.*Install torchaudio, or save the file with 48000 Hz"):
        read_audio(write_wav(tmp_path / "a.wav", 0.1, rate=44_100))


# -- readers that are there --------------------------------------------------------------------------------------------


class _File:
    """A stand-in for soundfile.SoundFile: two channels of 0.5."""

    samplerate, channels = 48_000, 2

    def __init__(self, path):
        if "damaged" in path:
            raise RuntimeError(f"Error opening {path!r}: unknown format.")
        self.left = 4800 if "cut" not in path else -1

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    def read(self, frames, dtype, always_2d):
        numpy = pytest.importorskip("numpy")
        if self.left < 0:
            raise RuntimeError("unexpected end of file")
        count, self.left = min(frames, self.left), max(0, self.left - frames)
        return numpy.full((count, 2), 0.5, dtype=dtype)


@pytest.fixture
def packages(monkeypatch):
    """Stand-ins for soundfile and torchaudio: 0.5 is soundfile's, 0.25 torchaudio's."""
    soundfile, torchaudio = ModuleType("soundfile"), ModuleType("torchaudio")
    soundfile.SoundFile = _File
    torchaudio.load = lambda path: (torch.full((2, 4800), 0.25), 48_000)
    monkeypatch.setitem(sys.modules, "soundfile", soundfile)
    monkeypatch.setitem(sys.modules, "torchaudio", torchaudio)
    monkeypatch.setattr(audio.importlib, "import_module", importlib.import_module)
    return torchaudio


@pytest.mark.parametrize(("name", "value"), [("a.wav", 0.5), ("a.flac", 0.5), ("a.mp3", 0.25), ("a.m4a", 0.25)])
def test_lossy_files_are_read_by_what_upstream_reads_them_with(name, value, tmp_path, packages):
    (tmp_path / name).write_bytes(b"x" * 64)
    found = read_audio(tmp_path / name)
    assert float(found.samples[0, 0]) == value and found.how == ("soundfile" if value == 0.5 else "torchaudio")


def test_a_reader_that_cannot_read_a_file_leaves_it_to_the_next(tmp_path, packages):
    (tmp_path / "damaged.wav").write_bytes(b"x" * 64)
    assert read_audio(tmp_path / "damaged.wav").how == "torchaudio"


def test_a_torchaudio_without_its_torchcodec_is_named(tmp_path, packages, monkeypatch):
    def load(path):
        raise ImportError("TorchCodec is required for load_with_torchcodec. Please install torchcodec to use this.")

    packages.load = load
    monkeypatch.setattr(audio.shutil, "which", lambda name: None)
    (tmp_path / "damaged.m4a").write_bytes(b"x" * 64)
    said = look_at(tmp_path / "damaged.m4a").unusable
    assert "torchaudio is there, but torchcodec is not there" in said and "ffmpeg is not there" in said
    assert "soundfile cannot read it (Error opening 'damaged.m4a': unknown format.)" in said


def test_a_file_that_ends_in_the_middle_is_damaged(tmp_path, packages):
    (tmp_path / "cut.wav").write_bytes(b"x" * 64)
    assert "is damaged (unexpected end of file). Save it again" in look_at(tmp_path / "cut.wav").unusable
    with pytest.raises(Refusal, match="is damaged"):
        read_audio(tmp_path / "cut.wav")


FFMPEG = """#!{python}
import struct, sys
if "damaged" in " ".join(sys.argv):
    sys.exit("moov atom not found")
samples = struct.pack("<2f", 0.75, -2.0) * 4800
head = b"RIFF" + b"\\xff" * 4 + b"WAVE" + b"LIST" + struct.pack("<I", 4) + b"INFO"
head += b"fmt " + struct.pack("<IHHIIHH", 16, 3, 2, 48000, 384000, 8, 32) + b"data" + b"\\xff" * 4
sys.stdout.buffer.write(head + samples)
"""


@pytest.fixture
def ffmpeg(tmp_path, monkeypatch):
    """A stand-in for ffmpeg that writes a WAV stream of unknown length, as ffmpeg does into a pipe."""
    if os.name == "nt":
        pytest.skip("starts a script by its first line")
    program = tmp_path / "programs" / "ffmpeg"
    program.parent.mkdir()
    program.write_text(FFMPEG.format(python=sys.executable), encoding="utf-8")
    program.chmod(0o755)
    without(monkeypatch, "soundfile", "torchaudio")
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)


def test_ffmpeg_reads_what_nothing_else_reads(tmp_path, ffmpeg):
    (tmp_path / "a.m4a").write_bytes(b"x" * 64)
    found = read_audio(tmp_path / "a.m4a")
    assert found.how == "ffmpeg" and found.samples.shape == (2, 4800) and found.seconds == 0.1
    assert found.samples[:, 7].tolist() == [0.75, -2.0]  # beyond full scale stays, as in upstream's preprocessing
    assert any("samples up to 2.00 stay" in note for note in look_at(tmp_path / "a.m4a").notes)


def test_what_ffmpeg_says_about_a_damaged_file_is_told(tmp_path, ffmpeg):
    (tmp_path / "damaged.m4a").write_bytes(b"x" * 64)
    assert "ffmpeg cannot read it (moov atom not found)" in look_at(tmp_path / "damaged.m4a").unusable


def test_samples_that_are_no_numbers_are_told(tmp_path, packages):
    packages.load = lambda path: (torch.tensor([[0.0, float("nan")] * 2400] * 2), 48_000)
    (tmp_path / "damaged.mp3").write_bytes(b"x" * 64)
    assert "no numbers (NaN or infinity)" in look_at(tmp_path / "damaged.mp3").unusable
