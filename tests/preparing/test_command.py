"""``acestep-train prepare`` and ``demo --songs``: what they print, and how they end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time

import pytest
from click.testing import CliRunner
from conftest import COMMAND, running
from preparing.conftest import write_texts, write_wav
from preparing.parts import digests, songs_of

from sidestep_plugin.cli import cli


@pytest.fixture
def command(checkout, checkpoints, tmp_path, monkeypatch):
    """Run the command in this process. Returns exit code, standard output and standard error."""
    if checkout.real:
        pytest.skip("the real VAE's encoder takes minutes on a CPU")
    monkeypatch.chdir(tmp_path)

    def run(*words):
        line = ["prepare", *map(str, words), "--acestep-root", str(checkout.root)]
        done = CliRunner().invoke(cli, [*line, "--checkpoint-dir", str(checkpoints), "--device", "cpu"])
        return done.exit_code, done.stdout, done.stderr

    return run


def test_what_is_printed_and_that_it_is_done(command, music, tmp_path):
    code, out, err = command("music", "--model", "base", "--output", "songs")
    assert code == 0 and err == "", err
    assert "Warning: rock/one.wav: 2.0 seconds, and the model generates 10 at least" in out
    assert "1/3 rock/one.wav: 0:02, " in out and "3/3 two.wav: 0:03, " in out and "left" in out
    assert f"3 songs prepared: {tmp_path / 'songs'}" in out
    code, out, err = command("music", "--model", "base", "--output", "songs")
    assert (code, err) == (0, "") and "3 songs as before" in out and "Loading" not in out
    looked, train = [line.strip() for line in out.splitlines() if line.startswith("    ")]
    assert (
        looked.endswith("acestep-train songs songs") and "--model base --dataset-dir songs --output-dir OUTPUT" in train
    )


def test_a_dry_run_shows_what_the_model_is_told_and_writes_nothing(command, music, tmp_path):
    code, out, err = command("music", "--model", "base", "--output", "songs", "--dry-run", "--trigger", "zxsound")
    assert (code, err) == (0, ""), err
    assert "rock/one.wav -> rock__one.pt, 0:02" in out
    assert "    | zxsound, loud guitars" in out and "    | # Languages" in out and "    | [Verse]" in out
    assert "from: one.caption.txt: caption" in out and "Nothing was written." in out
    assert not (tmp_path / "songs").exists()


def test_a_dry_run_ends_with_all_problems_by_kind(command, music):
    """What they are, how many songs have them, and what to do about it, once; and files that belong to nothing."""
    for name in ("a", "b"):
        write_wav(music / f"{name}.wav", 12.0, seed=7)
    write_texts(music, "a", caption="very " * 300)
    (music / "b.lyric.txt").write_text("la la", encoding="utf-8")
    code, out, _ = command("music", "--model", "base", "--output", "songs", "--dry-run")
    end = out.splitlines()[out.splitlines().index("Problems:") + 1 :]
    assert code == 0
    assert any(line.startswith("  b.wav: no caption: the file's name") for line in end)
    advice = "Write NAME.lyrics.txt, with [Instrumental] in it where nobody sings"
    assert f"  no lyrics: 3 of 5 songs (a.wav, b.wav, two.wav). {advice}" in end
    assert re.search(r"  a\.wav: prompt too long: the last \d+ tokens are cut\. Shorten the prompt\n", out)
    assert end[-2:] == ["Note: No song belongs to b.lyric.txt (expected b.lyrics.txt)", end[-1]]
    assert end[-1].startswith("5 songs for acestep-v15-base")


def test_a_language_for_all_songs_comes_after_every_file(command, music):
    write_texts(music, "two", caption="a quiet piano", lyrics="[Verse]\nla la")
    code, out, _ = command("music", "--model", "base", "--output", "songs", "--dry-run", "--language", "english")
    told = {block.split(" ->")[0]: block for block in re.split(r"\n(?=\S+ -> )", out)}
    assert code == 0 and "no language" not in out
    assert [re.search(r"# Languages\n *\| (\w+)", told[name])[1] for name in ("three.wav", "two.wav")] == ["de", "en"]
    assert "--language: language" in told["two.wav"] and "--language" not in told["three.wav"]
    code, _, err = command("music", "--model", "base", "--output", "songs", "--language", "klingon")
    assert code == 2 and "the model does not know 'klingon'. Expected a code such as en" in err


def test_tokens_that_are_cut_are_counted_by_song(command, music):
    write_texts(music, "two", caption="very " * 100, lyrics="[Verse]\n" + "la la la " * 300)
    code, out, _ = command("music", "--model", "base", "--output", "songs", "--dry-run")
    assert code == 0
    assert "of which the last" in out and "(the model reads 256)" in out and "(the model reads 2048)" in out
    code, out, _ = command("music", "--model", "base", "--output", "songs")
    assert "tokens of the prompt are cut: shorten the caption." in out and "tokens of the lyrics are cut." in out


def test_songs_that_cannot_be_prepared_end_it_with_exit_code_2(command, music, tmp_path):
    (music / "broken.mp3").write_bytes(b"<!doctype html><p>Not found")
    code, out, err = command("music", "--model", "base", "--output", "songs")
    assert code == 2 and "3 songs prepared" in out
    assert "1 song could not be prepared: broken.mp3" in err and "web page" in err and "Traceback" not in err
    assert len(songs_of(tmp_path / "songs")) == 3


@pytest.mark.parametrize(
    "words, message",
    [
        (["--model", "base", "--output", "songs"], "one of the two"),
        (["music", "--renew", "music", "--model", "base", "--output", "songs"], "one of the two"),
        (["music", "--model", "base"], "Name the folder for the songs"),
        (["music", "--model", "base", "--output", "songs", "--texts", "music"], "--texts belongs to --renew"),
        (["nothing", "--model", "base", "--output", "songs"], "No folder"),
        (["--renew", "music", "--model", "base", "--output", "songs"], "No songs in"),
        (["music", "--model", "jazz", "--output", "songs"], "No model 'jazz'"),
        (["music", "--model", "base", "--output", "music"], "is the folder that is read"),
        (["music", "--model", "base", "--output", "music/two.wav"], "Cannot write to"),
        (["music", "--model", "base", "--output", "songs", "--strict"], "--strict"),
        (["music", "--model", "base", "--output", "songs", "--dataset", "music/rock/one.json"], "dataset JSON"),
        (["music", "--model", "base", "--output", "songs", "--max-seconds", "0"], "--max-seconds"),
    ],
)
def test_wrong_usage_is_said_in_a_line_or_two(checkout, checkpoints, music, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    where = ["--acestep-root", str(checkout.root), "--checkpoint-dir", str(checkpoints), "--device", "cpu"]
    result = CliRunner().invoke(cli, ["prepare", *words, *where])
    assert result.exit_code == 2 and message in " ".join(result.output.split()), result.output
    assert not list(tmp_path.glob("songs*/*.pt"))


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="permissions do not bind this user")
def test_an_output_folder_that_cannot_be_written_is_said(command, music, tmp_path):
    (tmp_path / "songs").mkdir(mode=0o500)
    code, _, err = command("music", "--model", "base", "--output", "songs")
    assert code == 2 and "Cannot write to" in err


@pytest.mark.slow
def test_a_full_disk_leaves_finished_songs_and_no_half_one(prepare, music, monkeypatch, tmp_path, checkout):
    from sidestep_plugin import files
    from sidestep_plugin.preparing import job

    count = iter(range(1, 100))
    original = job.write_song

    def full(file, song):
        if next(count) == 2:
            with pytest.MonkeyPatch.context() as patch:

                def fail(_):
                    raise OSError(28, "No space left on device", str(file))

                patch.setattr(files.os, "fsync", fail)
                original(file, song)
        original(file, song)

    with monkeypatch.context() as patch:
        patch.setattr(job, "write_song", full)
        with pytest.raises(OSError, match="No space left"):
            prepare(music)
    folder = tmp_path / "songs"
    assert [file.name for file in folder.iterdir() if file.suffix in (".pt", ".tmp")] == ["rock__one.pt"]
    assert prepare(music).done.made == 2


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGKILL", signal.SIGTERM)])
def test_whatever_kills_it_finished_songs_are_whole_and_not_made_twice(
    checkout, checkpoints, tmp_path, command, music, how
):
    for number in range(20):
        write_wav(music / f"more{number:02}.wav", 12.0, seed=100 + number)
    whole = command("music", "--model", "base", "--output", "whole")
    assert whole[0] == 0
    line = [*COMMAND, "prepare", "music", "--model", "base", "--output", "songs", "--device", "cpu"]
    line += ["--acestep-root", str(checkout.root), "--checkpoint-dir", str(checkpoints)]
    with running(line, cwd=tmp_path, stderr=subprocess.PIPE) as process:
        for text in process.stdout:
            if text.startswith("5/"):
                break
        process.send_signal(how)
        process.wait()
        err = process.stderr.read()
    if how != getattr(signal, "SIGKILL", None):
        assert process.returncode == 130 and "the same command goes on" in err
    finished = {name for name in digests(tmp_path / "songs") if name.endswith(".pt") and not name.startswith(".")}
    assert len(finished) >= 5
    code, out, _ = command("music", "--model", "base", "--output", "songs")
    assert code == 0 and f"{len(finished)} songs as before" in out
    assert digests(tmp_path / "songs") == digests(tmp_path / "whole")


@pytest.mark.slow
def test_the_demo_goes_from_audio_to_adapter_to_clip(tmp_path):
    line = [*COMMAND, "demo", "--songs", "--dir", "demo"]
    began = time.monotonic()
    done = subprocess.run(line, capture_output=True, text=True, encoding="utf-8", cwd=tmp_path, timeout=500)
    print(f"{time.monotonic() - began:.1f} s")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "acestep-train prepare demo" in done.stdout and "4 songs prepared" in done.stdout
    output = tmp_path / "demo" / "output" / "base-lora"
    assert (output / "final" / "adapter" / "adapter_model.safetensors").is_file()
    table = json.loads((output / "previews" / "previews.json").read_text(encoding="utf-8"))
    assert all(clip.endswith(".wav") for row in table["rows"] for clip in row["clips"])
    song = songs_of(tmp_path / "demo" / "songs")["harbour"]["metadata"]
    assert song["language"] == "de" and song["prepared"]["form"] == "generated"
