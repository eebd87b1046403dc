"""Two trainings never use one output folder at once, and a process that is killed leaves nothing that locks it."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest
from conftest import COMMAND, SETTINGS, known_fields

from sidestep_plugin import Refusal, attach, hookimpl
from sidestep_plugin.engine import shapes
from sidestep_plugin.resuming import lock as locking
from sidestep_plugin.resuming.lock import FILE_NAME, OutputLock

HOLD = """
import os, sys, time
from pathlib import Path
from sidestep_plugin.resuming.lock import OutputLock
lock = OutputLock(Path(sys.argv[1]))
lock.acquire()
if "fork" in sys.argv:
    if os.fork() == 0:  # as the loader of songs forks its workers
        print("locked", flush=True)
        os.read(int(sys.argv[2]), 1)
        os._exit(0)
else:
    print("locked", flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder():
    """Start a process that locks a folder | returns it once it has."""
    running = []

    def start(folder, *words, **more):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(folder), *words], stdout=subprocess.PIPE, text=True, **more
        )
        running.append(process)
        assert process.stdout.readline() == "locked\n"
        return process

    yield start
    for process in running:
        process.kill()
        process.communicate(timeout=60)


def acquired(folder):
    lock = OutputLock(folder)
    lock.acquire()
    assert lock.warning is None
    return lock


def test_another_process_is_named_and_a_killed_one_locks_nothing(holder, tmp_path):
    process = holder(tmp_path / "output")
    with pytest.raises(
        Refusal, match=rf"Another training is running in .*output \(process {process.pid} on .*--output"
    ):
        acquired(tmp_path / "output")
    process.kill()
    process.wait(timeout=60)
    assert (tmp_path / "output" / FILE_NAME).is_file(), "the killed process left its file"
    acquired(tmp_path / "output").release()
    assert not (tmp_path / "output" / FILE_NAME).exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")
def test_a_forked_worker_does_not_keep_the_lock_of_a_killed_training(holder, tmp_path):
    reading, writing = os.pipe()
    process = holder(tmp_path / "output", str(reading), "fork", pass_fds=[reading])
    with pytest.raises(Refusal):
        acquired(tmp_path / "output")
    process.kill()
    process.wait(timeout=60)
    try:
        acquired(tmp_path / "output").release()  # the worker is still there
    finally:
        os.write(writing, b".")
        for end in (reading, writing):
            os.close(end)


def test_one_process_cannot_lock_twice_and_leaves_no_trace(tmp_path):
    folder = tmp_path / "new" / "output"
    with OutputLock(folder) as lock:
        lock.acquire()
        with pytest.raises(Refusal, match=f"process {os.getpid()} on "):
            acquired(folder)
    assert list(tmp_path.iterdir()) == []
    lock.release()
    lock = acquired(folder)
    (folder / "adapter").touch()
    lock.release()
    assert [place.name for place in folder.iterdir()] == ["adapter"]


@pytest.mark.parametrize("code", ["ENOLCK", "ENOTSUP", "ENOSYS"])
def test_a_file_system_without_locks_is_only_warned_of(tmp_path, monkeypatch, code):
    def cannot(_):
        raise OSError(getattr(errno, code), "No locks available")

    monkeypatch.setattr(locking, "_lock", cannot)
    lock = OutputLock(tmp_path)
    lock.acquire()
    assert "could not be locked (No locks available). Start no second training" in lock.warning
    lock.release()


@pytest.mark.skipif(os.name == "nt" or not os.getuid(), reason="root may write everything")
def test_another_users_file(tmp_path):
    (tmp_path / FILE_NAME).touch(0o444)
    lock = acquired(tmp_path)
    with pytest.raises(Refusal, match="its process is unknown"):
        acquired(tmp_path)
    lock.release()


# -- trainings -------------------------------------------------------------------------------------------------------


@pytest.fixture
def training(checkout, trainer, load, tmp_path):
    """A training as ACE-Step's app starts it; its generator."""

    def start():
        config = known_fields(trainer.TrainingConfig, SETTINGS | {"output_dir": str(tmp_path / "output")})
        made = getattr(trainer, shapes.TRAINER_CLASS["lora"])(load("base"), trainer.LoRAConfig(r=4, alpha=8), config)
        return made.train_from_preprocessed(str(checkout.tensors), {"should_stop": False})

    return start


def test_a_second_training_in_one_folder_is_refused_and_the_first_goes_on(training, trainer, tmp_path):
    with attach(trainer, announce=print) as attachment:
        first = training()
        next(first)
        (refused,) = training()
        assert refused[2].startswith("❌ Another training is running in ") and f"process {os.getpid()}" in refused[2]
        assert isinstance(attachment.refusal, Refusal)
        assert "Training complete" in [*first][-1][2]
        assert not (tmp_path / "output" / FILE_NAME).exists()
        assert "Training complete" in [*training()][-1][2]  # one after the other is what people do


def test_a_training_that_nobody_listens_to_any_more_locks_nothing(training, trainer):
    with attach(trainer, announce=print):
        first = training()
        next(first)
        first.close()
        assert "Training complete" in [*training()][-1][2]


def test_a_training_that_fails_locks_nothing(training, trainer):
    class Failing:
        @hookimpl
        def acestep_step_finished(self, step):
            raise RuntimeError("the plugin's own trouble")

    with attach(trainer, announce=print, extra_plugins={"failing": Failing()}):
        assert "❌" in [*training()][-1][2]
    with attach(trainer, announce=print):
        assert "Training complete" in [*training()][-1][2]


def test_without_plugins_there_is_no_file_of_ours(training, trainer, tmp_path):
    with attach(trainer, plugins=()):
        for _ in training():
            assert not (tmp_path / "output" / FILE_NAME).exists()


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="kills as POSIX does")
def test_two_command_lines(checkout, tmp_path):
    """The second one changes nothing, not even what looks left over; after a kill the next one resumes."""
    if checkout.real:
        pytest.skip("a process of its own imports the checkout's own environment")
    output = tmp_path / "output"
    line = [*COMMAND, "--plugin", "sidestep", "--model", "base", "--epochs", "100000", "--save-every", "1"]
    line += ["--acestep-root", checkout.root, "--checkpoint-dir", checkout.checkpoints, "--device", "cpu"]
    line += ["--dataset-dir", checkout.tensors, "--output-dir", output, "--rank", "4", "--batch-size", "2"]

    def until(words, *more):
        process = subprocess.Popen([*line, *more], stdout=subprocess.PIPE, text=True, encoding="utf-8")
        assert any(words in text for text in process.stdout), process.communicate(timeout=60)
        return process

    def kill(process):
        process.kill()
        process.communicate(timeout=60)

    first = until("Checkpoint saved at epoch 2")
    try:
        staged = output / "checkpoints" / ".epoch_9.0badcafe.saving"
        staged.mkdir()
        for more in (["--resume-from", "latest"], ["--overwrite"], []):
            done = subprocess.run([*line, *more], capture_output=True, text=True, encoding="utf-8", timeout=300)
            assert done.returncode == 2, done.stdout + done.stderr
            assert f"Another training is running in {output} (process {first.pid} on " in done.stderr
            assert done.stderr.count("\n") <= 2 and first.poll() is None
        assert staged.is_dir()
    finally:
        kill(first)
    assert (output / FILE_NAME).is_file()
    kill(until("✅ Resumed", "--resume-from", "latest"))
    assert not staged.exists()


def test_an_undoing_that_fails_leaves_nothing_else_undone(train, tmp_path):
    """The folder's lock is the first thing that a training in the app takes, and the last one that it gives back."""

    class Failing:
        @hookimpl
        def acestep_run_started(self, run):
            run.engine.at_end(lambda: 1 / 0)

    output = tmp_path / "shared"
    with pytest.raises(ZeroDivisionError):
        train("base", max_epochs=1, output_dir=str(output), extra_plugins={"failing": Failing()})
    assert train("base", max_epochs=1, output_dir=str(output)).messages[-1].startswith("✅ Training complete")
