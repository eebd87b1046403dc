"""What is said is so: advice that helps, options that count, numbers of what is meant."""

from __future__ import annotations

import shlex
import shutil
import subprocess

import pytest
import torch
from click.testing import CliRunner
from conftest import COMMAND

from sidestep_plugin.cli import cli


@pytest.fixture
def invoke(checkout, trainer, tmp_path, monkeypatch):
    """Run a command in an empty folder, with the checkout's models."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sidestep_plugin.cli.quiet.quiet_upstream", lambda: None)

    def run(*line):
        words = [f"--acestep-root={checkout.root}", f"--checkpoint-dir={checkout.checkpoints}"]
        return CliRunner().invoke(cli, [*map(str, line), *words], catch_exceptions=False)

    return run


@pytest.fixture
def training(checkout, tmp_path):
    line = ["train", "--plugin=sidestep", "--model=base", "--device=cpu", f"--dataset-dir={checkout.tensors}"]
    return [*line, f"--output-dir={tmp_path / 'out'}", "--epochs=1"]


@pytest.fixture
def other_songs(checkout, tmp_path):
    """Songs that are none of the checkout's."""
    folder = tmp_path / "other songs"
    folder.mkdir()
    for number in (1, 2):
        song = torch.load(checkout.tensors / f"song_0{number}.pt")
        song["target_latents"] = song["target_latents"] + 0.5
        torch.save(song, folder / f"other_{number}.pt")
    return folder


def test_allowing_duplicates_is_advised_where_it_helps(invoke, training, other_songs, checkout, tmp_path):
    shutil.copy(other_songs / "other_1.pt", other_songs / "copy.pt")
    asks = "train on them on purpose: --allow-duplicates"
    done = invoke(*training, f"--validation-dir={other_songs}")
    assert done.exit_code == 2 and "Take the copies out." in done.stderr and asks not in done.stderr
    done = invoke(*[word for word in training if "dataset" not in word], f"--dataset-dir={other_songs}")
    assert done.exit_code == 2 and asks in done.stderr
    done = invoke(*training)
    assert done.exit_code == 0, done.output
    done = invoke("compare", tmp_path / "out", "--model=base", f"--dataset-dir={other_songs}", "--device=cpu")
    assert done.exit_code == 2 and "Take the copies out." in done.stderr and asks not in done.stderr


@pytest.mark.slow
def test_the_settings_file_of_a_training_with_a_validation_folder_repeats_it(invoke, training, other_songs, tmp_path):
    done = invoke(*training, f"--validation-dir={other_songs}", "--validate-every=1", "--patience=3")
    assert done.exit_code == 0, done.output
    file = tmp_path / "out" / "final" / "adapter" / "training_options.toml"
    text = file.read_text(encoding="utf-8")
    assert str(other_songs) not in text
    (command,) = [line for line in text.splitlines() if "acestep-train --config" in line]
    words = shlex.split(command.removeprefix("#"))[1:]
    assert words[-2:] == ["--validation-dir", "DIR"]
    for option, folder in (("--config", file), ("--dataset-dir", training[4].partition("=")[2])):
        words[words.index(option) + 1] = str(folder)
    for option, folder in (("--output-dir", tmp_path / "again"), ("--validation-dir", other_songs)):
        words[words.index(option) + 1] = str(folder)
    done = invoke("train", *words, "--device=cpu")
    assert done.exit_code == 0, done.output


def test_only_songs_that_are_trained_on_are_counted_as_cut(invoke, training, checkout):
    lengths = {file.name: len(torch.load(file)["target_latents"]) for file in checkout.tensors.glob("*.pt")}
    done = invoke(*training, "--crop-seconds=0.8")
    longer = sum(length > 20 for length in lengths.values())
    assert f"({longer} of {len(lengths)} songs are longer)" in done.output
    done = invoke(*training, "--crop-seconds=0.8", "--validate=2", "--overwrite")
    assert f"of {len(lengths) - 2} songs" in done.output, done.output


@pytest.mark.parametrize("option", ["--preview-songs=3", "--preview-seconds=5", "--preview-cfg=3", "--preview-seed=1"])
def test_options_of_previews_without_previews_are_refused(invoke, training, option, tmp_path):
    done = invoke(*training, option)
    assert done.exit_code == 2, done.output
    assert f"{option.partition('=')[0]} says how to make previews, and none are made." in done.stderr
    assert "--preview-every N" in done.stderr and not (tmp_path / "out").exists()


def test_defaults_of_previews_may_be_said(invoke, training):
    assert invoke(*training, "--preview-songs=2", "--preview-seed=42", "--preview-seconds=20").exit_code == 0


def test_nothing_is_said_of_a_trigger_if_captions_are_not_known(invoke, training, checkout, tmp_path):
    songs = tmp_path / "songs"
    songs.mkdir()
    for file in checkout.tensors.glob("*.pt"):
        song = torch.load(file)
        torch.save(song | ({"metadata": {}} if file.stem == "song_02" else {}), songs / file.name)
    done = invoke(*[word for word in training if "dataset" not in word], f"--dataset-dir={songs}", "--trigger=zzk")
    assert done.exit_code == 0 and "no caption" not in done.output


@pytest.mark.slow
def test_the_demo_does_not_speak_of_an_option_that_nobody_typed(tmp_path):
    for _ in range(2):
        line = [*COMMAND, "demo", "--dir", str(tmp_path / "demo")]
        done = subprocess.run(line, capture_output=True, text=True, encoding="utf-8")
        assert done.returncode == 0, done.stderr
        assert "overwrite" not in done.stdout


def test_compare_has_no_option_that_clashes_with_a_plugins(invoke):
    done = CliRunner().invoke(cli, ["compare", "--help"])
    assert done.exit_code == 0 and "--plugin NAME|none" in done.output
    done = invoke("compare", "nothing", "--model=base", "--dataset-dir=nowhere", "--plugin", "sidestep")
    assert (
        done.exit_code == 2 and "which compare has already" not in done.stderr and "No such option" not in done.stderr
    )
