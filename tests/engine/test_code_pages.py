"""ACE-Step reads manifest.json in the system's code page: the file is named, and the way out of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import COMMAND

from sidestep_plugin.cli import cli


@pytest.fixture
def job(checkout, tmp_path):
    """The command line of a training on songs of which one has this name."""

    def make(name, text=None):
        songs = shutil.copytree(checkout.tensors, tmp_path / "songs")
        (songs / "manifest.json").unlink(missing_ok=True)
        (songs / "song_01.pt").rename(songs / name)
        text = text or json.dumps({"samples": sorted(song.name for song in songs.iterdir())}, ensure_ascii=False)
        (songs / "manifest.json").write_text(text, encoding="utf-8")
        folders = {
            "acestep-root": checkout.root,
            "checkpoint-dir": checkout.checkpoints,
            "dataset-dir": songs,
            "output-dir": tmp_path / "output",
        }
        line = ["train", "--plugin", "sidestep", "--model", "base", "--epochs", "1", "--device", "cpu"]
        return [*line, *(f"--{name}={folder}" for name, folder in folders.items())]

    return make


def assert_told(done, folder, page):
    error = " ".join(done.stderr.splitlines()[-1:])
    assert f"{folder / 'songs' / 'manifest.json'} has letters beyond ASCII" in error, done.stderr
    assert page in error and "PYTHONUTF8=1" in error and "delete the file" in error
    assert "links" not in error and not (folder / "output").exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "darwin", reason="macOS has no other code page than UTF-8")
def test_a_system_with_another_code_page(checkout, job, tmp_path):
    if checkout.real:
        pytest.skip("a process of its own imports the checkout's own environment")
    environment = os.environ | {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    line = [os.fsencode(word) for word in [*COMMAND, *job("для песни.pt")]]
    done = subprocess.run(line, capture_output=True, text=True, encoding="utf-8", env=environment)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "PYTHONUTF8=1" in done.stderr and "manifest.json has letters beyond ASCII" in done.stderr
    done = subprocess.run(line, capture_output=True, text=True, encoding="utf-8", env=environment | {"PYTHONUTF8": "1"})
    assert done.returncode == 0, done.stderr


@pytest.fixture
def code_page(trainer, monkeypatch):
    """Let ACE-Step read text files as on a system with this code page."""

    def set_to(page):
        def in_the_code_page(file, mode="r", **more):
            return Path(file).open(mode, **({"encoding": page} | more if "b" not in mode else more))

        data_module = sys.modules[trainer.PreprocessedDataModule.__module__]
        monkeypatch.setattr(data_module, "open", in_the_code_page, raising=False)
        monkeypatch.setattr("locale.getpreferredencoding", lambda _=True: page)
        monkeypatch.setattr("sidestep_plugin.cli.quiet.quiet_upstream", lambda: None)

    return set_to


@pytest.mark.parametrize(("page", "name"), [("cp1252", "für.pt"), ("cp1251", "ночь.pt"), ("cp932", "夜.pt")])
def test_songs_that_another_code_page_loses_or_cannot_read(job, code_page, tmp_path, page, name):
    line = job(name)
    code_page(page)
    done = CliRunner().invoke(cli, line, catch_exceptions=False)
    assert done.exit_code == 2, done.output
    assert_told(done, tmp_path, page)


@pytest.mark.parametrize("page", ["cp1252", "cp1251"])
def test_plain_names_are_the_same_in_every_code_page(job, code_page, page):
    line = job("night.pt")
    code_page(page)
    done = CliRunner().invoke(cli, line, catch_exceptions=False)
    assert done.exit_code == 0, done.output


def test_escapes_as_ace_step_writes_them_are_the_same_everywhere(job, code_page, tmp_path):
    line = job("für.pt", json.dumps({"samples": ["für.pt", "song_02.pt"]}))
    code_page("cp1251")
    done = CliRunner().invoke(cli, line, catch_exceptions=False)
    assert done.exit_code == 0, done.output
