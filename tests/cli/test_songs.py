"""``acestep-train songs``: the table, JSON, and folders without songs."""

import json
import os
import re

import pytest
import torch
from click.testing import CliRunner
from song_files import a_song, save

from sidestep_plugin.cli import cli
from sidestep_plugin.cli import songs as showing
from sidestep_plugin.cli.terminal import cells


def run(*arguments):
    return CliRunner().invoke(cli, ["songs", *map(str, arguments)], catch_exceptions=False)


@pytest.fixture
def folder(tmp_path):
    """A good song of 100 seconds, one with mistakes, and a file that is none."""
    frames = 2500
    shape = {
        "target_latents": torch.arange(frames * 64.0).view(frames, 64),
        "attention_mask": torch.ones(frames),
        "encoder_hidden_states": torch.zeros(769, 8),
        "encoder_attention_mask": torch.cat([torch.ones(100), torch.zeros(669)]),
        "context_latents": torch.zeros(frames, 128),
    }
    good = {"caption": "trg, smoky jazz with brushes and a walking bass", "lyrics": "[Verse 1]\nIn the night\nwe walk"}
    good |= {"duration": 100, "bpm": 120, "keyscale": "C major", "timesignature": "4", "language": "en"}
    save(tmp_path, "a.pt", a_song(**shape, metadata=good))
    save(
        tmp_path,
        "b.pt",
        a_song(**shape, metadata={**good, "duration": 0, "lyrics": "[Instrumental]", "caption": "b\x1b[2J"}),
    )
    (tmp_path / "c.pt").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    return tmp_path


def test_the_table_shows_length_prompt_lyrics_and_what_looks_wrong(folder):
    done = run(folder)
    lines = done.stdout.splitlines()
    assert done.exit_code == 0
    assert lines[:4] == [
        "song  length  conditions      prompt                                    lyrics                  wrong",
        "a.pt    1:40  ACE-Step's way  trg, smoky jazz with brushes and a wa...  In the night / we walk",
        "b.pt    1:40  ACE-Step's way  b\\x1b[2J                                  [Instrumental]          1",
        "c.pt       -  no song         -                                         -                       1",
    ]
    assert "3 songs, 3.3 minutes" in lines
    assert '- the model is told "duration: 0 seconds": b.pt' in lines
    (said,) = [line for line in lines if line.startswith("- cannot be read: ")]
    assert "Git LFS" in said and "git lfs pull" in said and said.endswith(": c.pt")
    assert lines[-1].startswith("    acestep-train prepare --renew ")


@pytest.mark.parametrize("width", [80, 100])
def test_the_table_fits_the_terminal(tmp_path, monkeypatch, width):
    """Names and texts are cut between words, with dots; Chinese letters take two columns."""
    name, caption = (
        "A very long name of a song that somebody has given it",
        "smoky jazz with brushes, a walking bass " * 3,
    )
    text = {"caption": caption, "lyrics": "[Verse]\nla la la la la la la la la"}
    save(tmp_path, f"{name}.pt", a_song(metadata=text))
    save(tmp_path, f"{'深夜的爵士乐' * 4}.pt", a_song(metadata=text | {"caption": "深夜的爵士乐" * 9}))
    monkeypatch.setattr(showing, "columns", lambda: width - 1)
    lines = run(tmp_path).stdout.splitlines()[:3]
    assert all(cells(line) < width for line in lines) and cells(lines[1]) > width - 12, lines
    assert lines[0].split() == ["song", "length", "conditions", "prompt", "lyrics", "wrong"]
    cut = re.findall(r"(\S+)\.\.\.", lines[1])
    assert len(cut) >= 2 and set(cut) < {*name.split(), *caption.split(), "la", "[Verse]", "/"}, lines[1]


def test_json_has_all_that_the_table_shows_and_more(folder):
    shown = json.loads(run(folder, "--json").stdout)
    first, _, third = shown["songs"]
    assert shown["seconds"] == 200.0 and shown["renew"].startswith("acestep-train prepare --renew")
    assert (first["file"], first["seconds"], first["wrong"]) == ("a.pt", 100.0, [])
    assert first["made"] == {
        "form": "upstream",
        "recorded": False,
        "model": "",
        "encoders": "",
        "rows": 769,
        "hidden": 669,
    }
    assert first["text"]["lyrics"].startswith("[Verse 1]") and first["prompt"] == first["text"]["caption"]
    assert third["made"] is third["text"] is third["prompt"] is None and third["wrong"]


def test_a_reason_that_all_songs_share_is_said_once(tmp_path):
    for number in range(7):
        save(
            tmp_path,
            f"{number}.pt",
            a_song(target_latents=torch.full((10, 64), float(number + 1)), metadata={"caption": "x"}),
        )
    assert "- does not say its duration: all 7 songs" in run(tmp_path).stdout.splitlines()


def test_songs_in_a_folder_inside_are_found_and_the_folder_is_named(tmp_path):
    save(tmp_path / "tensors", "a.pt")
    save(tmp_path / "other" / "deep", "a.pt")
    done = run(tmp_path)
    assert done.exit_code == 2 and f"found 1 in the folder {tmp_path / 'tensors'}. Name that folder" in done.stderr


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ([], "and the folder is empty"),
        (["a.wav", "b.mp3"], "found audio (1 .mp3, 1 .wav)"),
        (["notes.txt"], "expected .pt files"),
    ],
)
def test_a_folder_without_songs_says_what_is_there(files, says, tmp_path):
    for name in files:
        (tmp_path / name).write_bytes(b"x")
    done = run(tmp_path)
    assert done.exit_code == 2 and says in done.stderr and len(done.stderr.splitlines()) <= 2


def test_no_folder_at_all(tmp_path):
    assert run(tmp_path / "nowhere").exit_code == 2


class _Runs:
    """An object that makes a file when it is loaded."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


def test_python_objects_are_never_loaded_and_that_is_said(tmp_path):
    songs = tmp_path / "songs"
    save(songs, "a.pt", {"target_latents": _Runs(tmp_path / "made")})
    (songs / "b.pt").write_bytes(b"")
    out = run(songs).stdout
    assert "code; expected only tensors: a.pt" in out
    assert "- cannot be read: it is empty, as an interrupted download leaves it: b.pt" in out.splitlines()
    assert not (tmp_path / "made").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="makes a named pipe")
def test_what_is_no_file_is_a_row_and_is_never_opened(tmp_path):
    os.mkfifo(tmp_path / "a.pt")
    (tmp_path / "b.pt").mkdir()
    lines = run(tmp_path).stdout.splitlines()
    assert "- is a named pipe, not a file: a.pt" in lines and "- is a folder, not a file: b.pt" in lines
