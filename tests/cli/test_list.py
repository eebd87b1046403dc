"""``acestep-train list`` shows what lies in the folders of a training."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
from click.testing import CliRunner

from sidestep_plugin.cli import cli

SETTINGS = {"max_epochs": 3, "save_every_n_epochs": 1}


def run(*words):
    return CliRunner().invoke(cli, ["list", *map(str, words)], catch_exceptions=False)


@pytest.mark.parametrize("kind", ["lora", "lokr"])
def test_every_checkpoint_is_listed_with_its_epochs_mean_loss(train, kind):
    done = train("base", kind, **SETTINGS)
    means = [sum(done.losses[start : start + 3]) / 3 for start in (0, 3, 6)]
    entries = json.loads(run(done.output, "--json").output)
    assert [(entry["epoch"], entry["training_steps"]) for entry in entries] == [(1, 3), (2, 6), (3, 9), (3, 9)]
    assert [entry["loss"] for entry in entries] == pytest.approx([*means, means[-1]], abs=1e-5)
    assert [entry["resumable"] for entry in entries] == [True, True, True, False]
    for entry in entries:
        files = [file for file in (done.output / entry["name"]).rglob("*") if file.is_file()]
        assert entry["bytes"] == sum(file.stat().st_size for file in files)

    lines = run(done.output).output.splitlines()
    assert lines[0].split() == ["epoch", "steps", "loss", "MB"] and lines[5] == "" and len(lines) == 7
    assert lines[6].startswith("loss: mean over the training steps of that epoch. The loss in a folder's name is ACE")
    assert lines[1].split()[1:4] == ["1", "3", f"{means[0]:.4f}"]
    assert "final" in lines[4] and lines[4].endswith("cannot be resumed from")

    # A training that is still running has no report: the checkpoints' own states know the losses.
    (done.output / "training_report.json").unlink()
    entries = json.loads(run(done.output, "--json").output)
    assert [entry["loss"] for entry in entries[:3]] == pytest.approx(means, abs=1e-5)
    assert entries[3]["loss"] is None


def test_a_finished_training_is_listed_without_torch(train):
    output = train("base", **SETTINGS).output
    code = (
        "import sys\nfrom sidestep_plugin.cli import cli\ncli(sys.argv[1:], standalone_mode=False)\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, "list", output], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("False") and "epoch_3" in done.stdout


def test_checkpoints_that_acestep_alone_made(train):
    output = train("base", plugins=None, **SETTINGS).output
    entries = json.loads(run(output, "--json").output)
    assert [entry["epoch"] for entry in entries if entry["name"] != "final"] == [1, 2, 3]
    for entry in entries:
        if "_loss_" in entry["name"] and not entry["name"].endswith("_0.0000"):
            assert entry["loss"] == float(entry["name"].rpartition("_")[2])


def test_a_folder_with_nothing_in_it(tmp_path):
    done = run(tmp_path)
    assert done.exit_code == 2 and "There is no adapter in" in done.stderr
    done = run(tmp_path / "gone")
    assert done.exit_code == 2 and "No folder" in done.stderr


def test_folders_that_are_cut_off_are_listed_with_what_is_known(train):
    output = train("base", **SETTINGS).output
    (folder, *_) = sorted((output / "checkpoints").iterdir())
    (folder / "resume_state.pt").write_bytes(b"cut off")
    (folder / "adapter" / "training_config.json").write_text("{", encoding="utf-8")
    (output / "training_report.json").write_text("[]", encoding="utf-8")
    shutil.rmtree(output / "final")
    entries = json.loads(run(output, "--json").output)
    assert len(entries) == 3 and sorted(entry["epoch"] for entry in entries) == [1, 2, 3]
