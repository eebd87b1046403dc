"""Which checkpoint ``--resume-from latest`` takes, whatever the clock says, and what ``--overwrite`` leaves."""

from __future__ import annotations

import io
import os
import re
import shutil
import signal
import time
from contextlib import contextmanager

import pytest
import torch
from click.testing import CliRunner

from sidestep_plugin import Refusal
from sidestep_plugin.cli import cli, quiet
from sidestep_plugin.launch.launch import Launch
from sidestep_plugin.resuming import checkpoints
from sidestep_plugin.resuming.checkpoints import STATE_FILE, newest_checkpoint, read_checkpoint
from sidestep_plugin.run import ResumePoint

QUICK = ("--batch-size", 2, "--save-every", 1, "--rank", 4, "--alpha", 8, "--device", "cpu")


@pytest.fixture
def run(checkout, trainer, tmp_path, monkeypatch):
    """Run ``acestep-train`` in this process: ``run("--epochs", 2)``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quiet, "quiet_upstream", lambda: None)
    places = {"acestep-root": checkout.root, "checkpoint-dir": checkout.checkpoints, "dataset-dir": checkout.tensors}

    def invoke(*arguments, plugin="sidestep"):
        line = [f"--plugin={plugin or 'none'}"]
        line += ["--model", "base", "--output-dir", tmp_path / "output", *QUICK, *arguments]
        for name, folder in places.items():
            line += [f"--{name}", folder]
        return CliRunner().invoke(cli, [*map(str, line)], catch_exceptions=False)

    return invoke


def epochs_in(output):
    return sorted(re.match(r"epoch_\d+", folder.name)[0] for folder in (output / "checkpoints").iterdir())


def state_of(output, epoch):
    # Some versions of ACE-Step write the loss into the name, too.
    (folder,) = (place for place in (output / "checkpoints").iterdir() if re.match(rf"epoch_{epoch}(_|$)", place.name))
    return folder / STATE_FILE


def change(file, **entries):
    torch.save(torch.load(file, weights_only=True) | entries, file)


def resumed_from(result):
    assert result.exit_code == 0, result.output
    return re.search(r"Resuming from .*(epoch_\d+|interrupted)", result.output)[1]


# -- the clock -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_clock_that_was_set_back(run, monkeypatch, tmp_path):
    """Saves after it are the newest all the same, also in a training that began anew before."""
    assert run("--epochs", 1).exit_code == 0
    assert run("--epochs", 2, "--overwrite", "--seed", 3).exit_code == 0
    monkeypatch.setattr(checkpoints.time, "time", lambda: time.mktime((2001, 1, 1, 0, 0, 0, 0, 0, 0)))
    assert resumed_from(run("--epochs", 3, "--resume-from", "latest")) == "epoch_2"
    assert resumed_from(run("--epochs", 4, "--resume-from", "latest")) == "epoch_3"


def test_a_checkpoint_dated_ahead_does_not_stay_the_newest(run, tmp_path):
    assert run("--epochs", 2).exit_code == 0
    change(state_of(tmp_path / "output", 1), saved_at=time.time() + 1e9)
    assert resumed_from(run("--epochs", 3, "--resume-from", "latest")) == "epoch_2"


@pytest.mark.slow
def test_the_order_of_saving_counts_and_not_the_epoch(run, tmp_path):
    """Somebody goes back to an earlier checkpoint: what is saved from there on is newer than what was there."""
    output = tmp_path / "output"
    assert run("--epochs", 4).exit_code == 0
    earlier = state_of(output, 1).parent
    assert run("--epochs", 2, "--learning-rate", 0.001, "--resume-from", earlier).exit_code == 0
    folder, notes = newest_checkpoint(output)
    assert (read_checkpoint(folder).point.epochs, notes) == (2, [])


@pytest.mark.slow
def test_checkpoints_of_earlier_versions_are_ordered_as_they_were(run, tmp_path):
    output = tmp_path / "output"
    assert run("--epochs", 3).exit_code == 0
    for epoch, saved_at in ((1, 100.0), (2, 300.0), (3, 200.0)):
        state = torch.load(state_of(output, epoch), weights_only=True)
        del state["save_number"]
        torch.save(state | {"saved_at": saved_at}, state_of(output, epoch))
    assert newest_checkpoint(output)[0].name.startswith("epoch_2")
    (output / checkpoints.BEGAN).write_text("400.0\n", encoding="utf-8")
    with pytest.raises(Refusal, match="of the training that --overwrite replaced"):
        newest_checkpoint(output)
    (output / checkpoints.BEGAN).write_text("250.0\n", encoding="utf-8")
    assert resumed_from(run("--epochs", 4, "--resume-from", "latest")) == "epoch_2"
    assert read_checkpoint(newest_checkpoint(output)[0]).point.epochs == 4
    # A new save is newer than any that has no number, whatever the clock said then.
    assert newest_checkpoint(output)[0].name.startswith("epoch_4")


@pytest.mark.slow
def test_a_state_that_nothing_can_be_made_of_is_skipped(run, tmp_path):
    output = tmp_path / "output"
    assert run("--epochs", 3).exit_code == 0
    shutil.rmtree(output / "final")
    change(state_of(output, 3), epochs=float("inf"))
    change(state_of(output, 2), saved_at=float("nan"), save_number=float("nan"))
    result = run("--epochs", 3, "--resume-from", "latest")
    assert resumed_from(result) == "epoch_1"
    assert "Note: skipped epoch_3" in result.output and "is not complete: what was saved" in result.output


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage",
    [
        {"random": {"torch": torch.get_rng_state(), "python": [1, [2], None]}},
        {"random": {"torch": torch.get_rng_state(), "numpy": ["MT19937"]}},
        {"random": {"torch": torch.get_rng_state().float()}},
        {"files": {5: 5}},
    ],
    ids=["python's state", "numpy's state", "torch's state", "files"],
)
def test_states_of_another_form_are_not_resumed(run, tmp_path, damage):
    output = tmp_path / "output"
    assert run("--epochs", 2).exit_code == 0
    shutil.rmtree(output / "final")
    change(state_of(output, 2), **damage)
    assert resumed_from(run("--epochs", 3, "--resume-from", "latest")) == "epoch_1"


def test_gradients_of_more_tensors_than_there_are_do_not_fit(run, tmp_path):
    output = tmp_path / "output"
    assert run("--epochs", 2).exit_code == 0
    shutil.rmtree(output / "final")
    change(state_of(output, 2), gradients=[None] * 999)
    result = run("--epochs", 3, "--resume-from", "latest")
    assert result.exit_code != 0 and "The checkpoint does not fit this adapter" in result.output + result.stderr


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_named_pipe_for_the_time_of_an_earlier_version_is_not_waited_for(run, tmp_path):
    output = tmp_path / "output"
    assert run("--epochs", 2).exit_code == 0
    os.mkfifo(output / checkpoints.BEGAN)
    assert newest_checkpoint(output)[0].name.startswith("epoch_2")


# -- overwriting -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("plugin", ["sidestep", None])
def test_overwriting_leaves_no_checkpoint_of_the_training_before(run, tmp_path, plugin):
    output = tmp_path / "output"
    assert run("--epochs", 4, plugin=plugin).exit_code == 0
    if plugin is None:  # as its name is the same, so may be its content: what is new has to stay
        names = epochs_in(output)
        assert run("--epochs", 4, "--overwrite", plugin=plugin).exit_code == 0
        assert epochs_in(output) == names
    result = run("--epochs", 2, "--overwrite", plugin=plugin)
    assert result.exit_code == 0, result.output
    assert epochs_in(output) == ["epoch_1", "epoch_2"] and not (output / "overwritten").exists()
    assert result.output.count("Note: removed 4 checkpoints of the training that --overwrite replaced.") == 1


def test_a_new_training_that_saves_nothing_puts_the_old_checkpoints_back(run, trainer, monkeypatch, tmp_path):
    output = tmp_path / "output"
    assert run("--epochs", 2).exit_code == 0
    before = {file: file.read_bytes() for file in output.rglob("*") if file.is_file() and "logs" not in file.parts}

    def fail(*_, **__):
        raise RuntimeError("the computer's own trouble")

    monkeypatch.setattr(trainer.F, "mse_loss", fail)
    result = run("--epochs", 2, "--overwrite")
    assert result.exit_code == 1 and "are back in place" in result.output, result.output
    after = {file: file.read_bytes() for file in output.rglob("*") if file.is_file() and "logs" not in file.parts}
    assert after == before


@pytest.mark.slow
def test_what_a_killed_training_set_aside_is_no_checkpoint_of_the_next(run, tmp_path):
    from sidestep_plugin.resuming.overwriting import Overwriting

    output = tmp_path / "output"
    for _ in range(2):
        assert run("--epochs", 2, "--overwrite").exit_code == 0
        note = state_of(output, 1).parent / "note.txt"
        note.write_text("mine", encoding="utf-8")
        Overwriting(output).begin()  # and no more
        with pytest.raises(Refusal, match="overwritten holds those of the training that --overwrite replaced"):
            newest_checkpoint(output)
    assert run("--epochs", 1, "--overwrite").exit_code == 0
    assert epochs_in(output) == ["epoch_1"]
    # A user's own files stay.
    kept = [file for file in (output / "overwritten").rglob("*") if file.is_file()]
    assert kept and {file.name for file in kept} == {"note.txt"}


# -- a finished training ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_finished_training_is_said_to_be_finished(run, tmp_path):
    output = tmp_path / "output"
    settings = ("--save-every", 2)  # the last checkpoint is not the end
    assert run("--epochs", 3, *settings).exit_code == 0
    before = {file: file.read_bytes() for file in output.rglob("*") if file.is_file()}
    for epochs in (3, 2):
        result = run("--epochs", epochs, *settings, "--resume-from", "latest")
        assert result.exit_code == 0, result.output
        assert "This training is finished after 3 epochs; nothing was changed." in result.output
        assert "more --epochs" in result.output and f"Adapter: {output / 'final'}" in result.output
        assert {file: file.read_bytes() for file in output.rglob("*") if file.is_file()} == before
    assert resumed_from(run("--epochs", 4, *settings, "--resume-from", "latest")) == "epoch_2"
    assert "finished after 4 epochs" in run("--epochs", 4, *settings, "--resume-from", "latest").output


@pytest.mark.slow
def test_a_training_that_was_finished_earlier_than_planned_is_finished(run, tmp_path, monkeypatch):
    """Its newest checkpoint is that of the stop, which was to have more epochs."""
    real = Launch.messages

    def pressing_ctrl_c(launch):
        for message in real(launch):
            if message[2].startswith("💾"):
                signal.raise_signal(signal.SIGINT)
            yield message

    output = tmp_path / "output"
    with monkeypatch.context() as patched:
        patched.setattr(Launch, "messages", pressing_ctrl_c)
        assert run("--epochs", 9, "--save-every", 2).exit_code == 130
    stopped = resumed_from(run("--epochs", 4, "--save-every", 9, "--resume-from", "latest"))
    assert stopped == "interrupted"
    before = {file: file.read_bytes() for file in output.rglob("*") if file.is_file()}
    result = run("--resume-from", "latest")
    assert result.exit_code == 0 and "finished after 4 epochs; nothing was changed" in result.output, result.output
    assert {file: file.read_bytes() for file in output.rglob("*") if file.is_file()} == before
    assert resumed_from(run("--epochs", 5, "--resume-from", "latest")) == "interrupted"


@pytest.mark.slow
def test_a_training_that_went_on_after_its_end_is_not_finished(run, tmp_path):
    output = tmp_path / "output"
    assert run("--epochs", 2).exit_code == 0
    finished = (output / checkpoints.FINISHED).read_bytes()
    assert run("--epochs", 4, "--resume-from", "latest").exit_code == 0
    (output / checkpoints.FINISHED).write_bytes(finished)  # killed before its end
    assert resumed_from(run("--epochs", 4, "--resume-from", "latest")) == "epoch_4"
    (output / checkpoints.FINISHED).write_text("[]", encoding="utf-8")
    assert resumed_from(run("--epochs", 4, "--resume-from", "latest")) == "epoch_4"
    shutil.rmtree(output / "final")
    assert resumed_from(run("--epochs", 4, "--resume-from", "latest")) == "epoch_4"
    assert (output / "final").is_dir()


def test_a_finished_training_without_checkpoints_says_so(run):
    assert run("--epochs", 2, "--save-every", 5).exit_code == 0
    result = run("--epochs", 3, "--resume-from", "latest")
    assert result.exit_code == 2 and "is finished and left no checkpoint to resume from" in result.stderr


def test_a_checkpoint_whose_state_found_no_room_is_none(run, tmp_path, monkeypatch):
    """Upstream's own state in it would pass for a checkpoint that upstream alone made, and be resumed otherwise."""
    from sidestep_plugin.resuming import plugin as resume_training

    real, calls = resume_training.write_resume_state, []

    def full(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(resume_training, "write_resume_state", full)
    result = run("--epochs", 2)
    assert result.exit_code == 0 and "no training can be resumed from" in result.output, result.output
    second = next((tmp_path / "output" / "checkpoints").glob("epoch_2*"))
    assert f"resumed from {second}: No space left" in result.output
    assert list(second.rglob("*.safetensors")) and not (second / checkpoints.UPSTREAMS_FILE).exists()
    assert newest_checkpoint(tmp_path / "output")[0].name.startswith("epoch_1")


@pytest.mark.parametrize("free", [0, 700, 5000])
def test_a_disk_that_is_full_in_the_middle_of_the_state_is_no_fault_of_torch(tmp_path, monkeypatch, free):
    """torch tells by a RuntimeError how many bytes its archive lacks. That ended the training."""

    @contextmanager
    def nearly_full(_):
        yield SmallDisk(free)

    monkeypatch.setattr(checkpoints, "replacing", nearly_full)
    state = ResumePoint(epochs=2, steps=0, random={"torch": torch.zeros(2000)})
    with pytest.raises(OSError, match="No space left on device"):
        checkpoints.write_resume_state(tmp_path / "epoch_2", state)


class SmallDisk(io.RawIOBase):
    """A file on a disk with so many free bytes."""

    def __init__(self, free):
        self.free = free

    def writable(self):
        return True

    def write(self, content):
        self.free -= len(content)
        if self.free < 0:
            raise OSError(28, "No space left on device")
        return len(content)
