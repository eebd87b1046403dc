"""The usual mistakes of the first hour, from public reports and from other trainers: each is told what to do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess

import pytest
from click.testing import CliRunner
from conftest import COMMAND

from sidestep_plugin.cli import cli


@pytest.fixture
def refused(checkout, trainer, tmp_path, monkeypatch):
    """Train with something wrong | returns the last line of the error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sidestep_plugin.cli.quiet.quiet_upstream", lambda: None)

    def run(*more, **folders):
        folders = {
            "acestep_root": checkout.root,
            "checkpoint_dir": checkout.checkpoints,
            "dataset_dir": checkout.tensors,
            "output_dir": tmp_path / "output",
        } | folders
        line = ["--plugin", "sidestep", *(f"--{name.replace('_', '-')}={place}" for name, place in folders.items())]
        more = more if any("model" in str(word) for word in more) else ("--model", "base", *more)
        done = CliRunner().invoke(cli, [*line, "--device", "cpu", *map(str, more)], catch_exceptions=False)
        assert done.exit_code == 2, done.output
        assert "Traceback" not in done.output and not (tmp_path / "output").exists()
        return done.stderr.strip().splitlines()[-1]

    return run


# -- folders and files -----------------------------------------------------------------------------------------------


def test_a_folder_inside_of_the_checkout_or_the_one_above_it(refused, tmp_path):
    from sidestep_plugin import miniature

    root = miniature.write_checkout(tmp_path / "above" / "ACE-Step")
    for said in (root / "acestep", root / "acestep" / "training", root.parent):
        assert f"Did you mean --acestep-root {root}?" in refused(acestep_root=said)
    (tmp_path / "empty").mkdir()
    assert "Give your checkout's folder" in refused(acestep_root=tmp_path / "empty")


def test_a_model_as_the_folder_of_models(refused, checkout):
    said = refused(checkpoint_dir=checkout.checkpoints / "acestep-v15-base")
    assert f"is a model itself. Name the folder above it: {checkout.checkpoints}" in said


def test_the_file_of_a_model(refused, checkout):
    folder = checkout.checkpoints / "acestep-v15-base"
    assert f"Name its folder: {folder}" in refused("--model", folder / "model.safetensors")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("Base", "base"),
        ("v15-base", "base"),
        ("acestep-v1.5-XL-Turbo", "xl-turbo"),
        ("ACE-Step/acestep-v15-xl-base", "xl-base|acestep-v15-xl-base"),
        ("acestep-v15-bse", "acestep-v15-base"),
    ],
)
def test_a_model_by_nearly_its_name(refused, name, meant, checkout):
    import re

    if (checkout.checkpoints / name).is_dir():
        pytest.skip("this file system does not tell capitals apart")
    assert re.search(rf"Did you mean ({meant})\?", refused("--model", name))


def test_a_file_as_the_folder_of_songs(refused, checkout):
    assert "it is a file. Name the folder of .pt files" in refused(dataset_dir=checkout.tensors / "song_01.pt")


def test_a_manifest_whose_songs_were_moved(refused, checkout, tmp_path):
    songs = shutil.copytree(checkout.tensors, tmp_path / "songs")
    names = [f"./datasets/elsewhere/{file.name}" for file in sorted(songs.glob("*.pt"))]
    (songs / "manifest.json").write_text(json.dumps({"samples": names}), encoding="utf-8")
    said = refused(dataset_dir=songs)
    assert f"manifest.json names {len(names)} that are not there, such as {names[0]}." in said
    assert "delete manifest.json to use every .pt file" in said


# -- what was typed or pasted ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", ["\\", "^", "`"])
def test_a_line_that_goes_on_as_in_another_shell(refused, sign):
    assert "` in PowerShell and ^ in cmd" in refused(sign, "--epochs", "3")


@pytest.mark.parametrize("dash", ["–", "—", "−", "‑", "––"])
def test_a_dash_of_a_word_processor(refused, dash):
    assert f"{dash}epochs begins with another sign than -. Type it again: --epochs" in refused(f"{dash}epochs", "3")
    done = CliRunner().invoke(cli, [f"{dash}plugin", "sidestep"])
    assert done.exit_code == 2 and "Type it again: --plugin" in done.stderr


def test_such_signs_in_a_text_are_no_mistake(refused):
    assert "is not a device" in refused("--title", "— live —", "--device", "gpu")


def test_a_comma_in_a_fraction(refused):
    assert "with a point, as in 0.0001" in refused("--learning-rate", "0,0001")


def test_settings_in_sections(refused, tmp_path):
    (tmp_path / "kohya.toml").write_text("[training]\nepochs = 5\n", encoding="utf-8")
    assert "Expected options without sections: leave [training] out." in refused("--config", "kohya.toml")


def test_a_quotation_mark_at_the_end_of_a_windows_path(monkeypatch):
    import click

    from sidestep_plugin import options

    class Windows:
        name = "nt"
        PathLike, fspath = os.PathLike, staticmethod(os.fspath)

    monkeypatch.setattr(options, "os", Windows)
    with pytest.raises(click.BadParameter, match=r"holds a quotation mark. Leave out the \\ before the closing one"):
        options.Place().convert('D:\\songs" --epochs 5', None, None)


# -- a Python in which torch is broken -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "line",
    [
        ["demo"],
        ["check"],
        ["estimate", "--model", "base", "--seconds", "9"],
        ["compare", "x", "--model", "base", "--dataset-dir", "y"],
        ["preview", "x"],
        ["timesteps", "--model", "base"],
        ["--model", "base", "--dataset-dir", "x", "--output-dir", "y"],
    ],
    ids=lambda line: line[0],
)
def test_a_torch_that_cannot_be_imported_is_said_and_nothing_else_is_blamed(checkout, tmp_path, line):
    (tmp_path / "site" / "torch").mkdir(parents=True)
    text = 'raise OSError("[WinError 126] The specified module could not be found. Error loading c10.dll")\n'
    (tmp_path / "site" / "torch" / "__init__.py").write_text(text, encoding="utf-8")
    path = os.pathsep.join(filter(None, [str(tmp_path / "site"), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [*COMMAND, *line],
        env=os.environ | {"PYTHONPATH": path},
        cwd=checkout.root,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert done.returncode == 2, done.stdout + done.stderr
    said = done.stderr.strip().splitlines()[-1]
    assert "torch cannot be imported in this Python (" in said and "c10.dll. Use the Python environment" in said
    assert "Traceback" not in done.stderr
