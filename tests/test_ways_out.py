"""What a message says when something else lies where a file belongs: what it is, and the way out."""

from __future__ import annotations

import json
import pathlib
import pickle
import shutil

import pytest
import torch
from click.testing import CliRunner

from sidestep_plugin.cli import cli
from sidestep_plugin.errors import Refusal
from sidestep_plugin.songs.dataset import inspect_dataset

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614\nsize 4792834\n"
PAGE = b"<!DOCTYPE html>\n<html><head><title>model.safetensors at main</title></head></html>\n"
STAND_INS = [(LFS_POINTER, "git lfs pull"), (PAGE, "download the file itself"), (b"", "interrupted download")]


@pytest.fixture
def invoke(checkout, trainer, tmp_path, monkeypatch):
    """Run a command that has to end with exit code 2 | returns the last line of what it says."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sidestep_plugin.cli.quiet.quiet_upstream", lambda: None)

    def run(*line):
        done = CliRunner().invoke(cli, [*map(str, line)], catch_exceptions=False)
        assert done.exit_code == 2, done.output
        assert "Traceback" not in done.output
        return done.stderr.strip().splitlines()[-1]

    return run


@pytest.fixture
def training(checkout, trainer, tmp_path):
    def line(**folders):
        folders = {
            "acestep_root": checkout.root,
            "checkpoint_dir": checkout.checkpoints,
            "dataset_dir": checkout.tensors,
            "output_dir": tmp_path / "output",
        } | folders
        words = ["train", "--plugin", "sidestep", "--model", "base", "--device", "cpu"]
        return [*words, *(f"--{name.replace('_', '-')}={folder}" for name, folder in folders.items() if folder)]

    return line


# -- a stand-in for the file -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("content", "says"), STAND_INS)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_in_a_models_folder(invoke, training, checkout, tmp_path, name, content, says):
    shutil.copytree(checkout.checkpoints / "acestep-v15-base", tmp_path / "models" / "acestep-v15-base")
    file = tmp_path / "models" / "acestep-v15-base" / name
    file.write_bytes(content)
    said = invoke(*training(checkpoint_dir=tmp_path / "models"))
    assert str(file) in said and says in said


@pytest.mark.parametrize(("content", "says"), STAND_INS)
def test_as_an_adapter(invoke, tmp_path, content, says):
    (tmp_path / "adapter_model.safetensors").write_bytes(content)
    assert says in invoke("inspect", tmp_path / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        *STAND_INS,
        (b"a text\n", "is not a file of tensors"),
        (pickle.dumps({"target_latents": 5}), "cannot be read|Python objects"),
    ],
)
def test_as_a_song(checkout, tmp_path, content, says):
    songs = shutil.copytree(checkout.tensors, tmp_path / "songs")
    (songs / "manifest.json").unlink(missing_ok=True)
    (songs / "odd.pt").write_bytes(content)
    with pytest.raises(Refusal, match=rf"odd\.pt \(.*({says})"):
        inspect_dataset(songs)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_song_that_holds_python_objects(checkout, tmp_path, zipped):
    songs = shutil.copytree(checkout.tensors, tmp_path / "songs")
    (songs / "manifest.json").unlink(missing_ok=True)
    torch.save({"path": pathlib.PurePosixPath("x")}, songs / "odd.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(Refusal, match=r"odd\.pt \(cannot be read: it holds Python objects .*expected only tensors"):
        inspect_dataset(songs)


# -- songs somewhere else --------------------------------------------------------------------------------------------


def test_songs_in_a_subfolder_are_named(invoke, training, checkout, tmp_path):
    (tmp_path / "above").mkdir()
    songs = shutil.copytree(checkout.tensors, tmp_path / "above" / "jazz")
    number = len(list(songs.glob("*.pt")))
    for line in (
        training(dataset_dir=tmp_path / "above"),
        ["estimate", "--model", "base", "--dataset-dir", tmp_path / "above", "--acestep-root", checkout.root],
    ):
        said = invoke(*line)
        assert f"found {number} in the folder {songs}. Name that folder" in said, said


# -- settings files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        r'dataset-dir = "D:\tensors\new songs"',
        r'dataset-dir = "D:\songs"',
        r'dataset-dir = "C:\Users\me"',
        r"dataset-dir = D:\songs",
        r'output-dir = "D:\beats"',
        r'model = "D:\tunes"',
    ],
)
def test_a_windows_path_in_double_quotes(invoke, training, tmp_path, line):
    (tmp_path / "jazz.toml").write_text(f"epochs = 5\n{line}\n", encoding="utf-8")
    said = invoke(*training(), "--config", "jazz.toml")
    assert "in single quotes, 'D:\\songs', or use /" in said, said


def test_a_windows_path_in_single_quotes_is_taken_as_it_is(invoke, training, tmp_path):
    (tmp_path / "jazz.toml").write_text("dataset-dir = 'D:\\tensors\\new songs'\n", encoding="utf-8")
    said = invoke(*training(dataset_dir=None), "--config", "jazz.toml")
    assert "No dataset folder" in said and "D:\\tensors\\new songs" in said


@pytest.mark.parametrize("encoding", ["utf-16", "cp1252"])
def test_a_settings_file_in_another_encoding(invoke, training, tmp_path, encoding):
    (tmp_path / "jazz.toml").write_text("epochs = 5 # für\n", encoding=encoding)
    said = invoke(*training(), "--config", "jazz.toml")
    assert "is not UTF-8" in said and "Save it as UTF-8" in said


def test_a_byte_order_mark_of_utf_8_is_no_problem(checkout, training, tmp_path, monkeypatch):
    monkeypatch.setattr("sidestep_plugin.cli.quiet.quiet_upstream", lambda: None)
    (tmp_path / "jazz.toml").write_text("epochs = 1\n", encoding="utf-8-sig")
    done = CliRunner().invoke(cli, [*training(), "--config", str(tmp_path / "jazz.toml")], catch_exceptions=False)
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("value", ["5", "true", "[1, 2]", "0.5", "{ a = 1 }", "2026-01-01", "[]"])
@pytest.mark.parametrize("option", ["dataset-dir", "output-dir", "validation-dir", "resume-from", "acestep-root"])
def test_something_else_where_a_text_belongs(invoke, training, tmp_path, option, value):
    (tmp_path / "jazz.toml").write_text(f"{option} = {value}\n", encoding="utf-8")
    said = invoke(*training(), "--config", "jazz.toml")
    assert "jazz.toml" in said and option in said and "xpected" in said, said


# -- options of a plugin that was not named --------------------------------------------------------------------------


def test_an_option_of_the_plugin_without_it(invoke, tmp_path):
    owner, without = "is an option of the plugin sidestep, which takes no part. Leave", ("--plugin", "none")
    assert f"--validate {owner} --plugin none out." in invoke(*without, "--model", "base", "--validate", 1)
    assert f"--crop-seconds {owner} --plugin none out." in invoke(*without, "--model", "base", "--crop-seconds=9")
    assert "Name that as well: --plugin sidestep." in invoke("run", "--validate", 1, "--", "acestep")
    (tmp_path / "jazz.toml").write_text("validate = 1\n", encoding="utf-8")
    assert f"validate {owner} it out, or" in invoke(*without, "--model", "base", "--config", "jazz.toml")
    (tmp_path / "jazz.toml").write_text('plugin = ["none"]\nvalidate = 1\n', encoding="utf-8")
    assert f"validate {owner} it out, or" in invoke("--model", "base", "--config", "jazz.toml")
    assert "Did you mean" in invoke("--plugin", "sidestep", "--model", "base", "--validat", 1)
    assert "No such option" in invoke("--model", "base", "--nothing-like-it", 1)


def test_a_manifest_of_names_that_are_not_there_is_not_about_subfolders(tmp_path):
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "song.pt").write_bytes(b"x")
    (tmp_path / "manifest.json").write_text(json.dumps({"samples": ["gone.pt"]}), encoding="utf-8")
    with pytest.raises(Refusal, match="manifest.json names 1 that are not there"):
        inspect_dataset(tmp_path)
