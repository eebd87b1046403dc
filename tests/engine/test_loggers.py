"""TensorBoard's log is a secondary output: whatever happens to it, the training goes on, the same bit for bit."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

KINDS = ("lora", "lokr")
SETTINGS = {"max_epochs": 3, "log_every_n_steps": 1}


@pytest.fixture
def writer(trainer):
    """TensorBoard's own class that writes records to the disk."""
    pytest.importorskip("lightning")
    return pytest.importorskip("tensorboard.summary.writer.record_writer").RecordWriter


@pytest.fixture
def full_disk(writer, monkeypatch):
    """From now on the disk is full for TensorBoard."""

    def fill():
        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(writer, "write", write)
        # Its thread dies with the first record, and every later one raises in the caller.
        monkeypatch.setattr("threading.excepthook", lambda args: None)

    return fill


def told_of_the_log(text):
    return [line for line in text.splitlines() if "log ends here" in line]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_full_disk_ends_the_log_and_not_the_training(train, equal_bits, full_disk, capsys, kind):
    undisturbed = train("base", kind, **SETTINGS)
    assert not told_of_the_log(capsys.readouterr().out)
    full_disk()
    trained = train("base", kind, options={"validate": 1, "validate_every": 1}, **SETTINGS)
    (line,) = told_of_the_log(capsys.readouterr().out)
    assert line == ("Warning: the TensorBoard log ends here: No space left on device. The training goes on without it.")
    assert trained.tensors and "complete" in trained.messages[-1], trained.messages
    assert equal_bits(undisturbed, train("base", kind, **SETTINGS))


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_where_the_log_belongs_is_said_once(train, trainer, monkeypatch, capsys, kind):
    pytest.importorskip("tensorboard")

    class InAFile(trainer.TensorBoardLogger):
        def __init__(self, *arguments, **settings):
            super().__init__(*arguments, **settings)
            Path(self.root_dir).mkdir(parents=True, exist_ok=True)
            Path(self.root_dir, self.name).write_text("not a folder")

    monkeypatch.setattr(trainer, "TensorBoardLogger", InAFile)
    trained = train("base", kind, **SETTINGS)
    assert trained.tensors and (trained.output / "logs").is_file(), trained.messages
    assert len(told_of_the_log(capsys.readouterr().out)) == 1


def test_what_a_plugin_logs_cannot_end_the_training_either(train, full_disk, capsys):
    import torch

    from sidestep_plugin import hookimpl

    class Histograms:
        @hookimpl
        def acestep_epoch_finished(self, run, epoch, loss):
            return {"loss of the epoch": loss, "weights": torch.arange(5.0)}

    full_disk()
    trained = train("base", plugins=(), extra_plugins={"histograms": Histograms()}, max_epochs=4, log_every_n_steps=10)
    assert trained.tensors, trained.messages
    assert len(told_of_the_log(capsys.readouterr().out)) == 1


def test_a_log_that_is_well_is_complete(train):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trained = train("base", options={"validate": 1, "validate_every": 1}, **SETTINGS)
    (folder,) = (trained.output / "logs").iterdir()
    log = events.EventAccumulator(str(folder)).Reload()
    assert [entry.step for entry in log.Scalars("train/epoch_loss")] == [1, 2, 3]
    assert any("validation" in tag for tag in log.Tags()["scalars"]), log.Tags()
