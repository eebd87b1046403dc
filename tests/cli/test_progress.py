"""What is shown of a training as it goes: names, times, and that nobody has to look."""

from __future__ import annotations

import os
import re
import subprocess
from types import SimpleNamespace

import pytest
from conftest import COMMAND

from sidestep_plugin.cli import progress as showing
from sidestep_plugin.cli.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """Seconds that go by when the test says so."""
    now = [100.0]
    monkeypatch.setattr(showing.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def stepping(clock):
    """A resumed training of 100 steps in 10 epochs, of which 50 were done: ``step(51)``."""
    progress = Progress()
    progress.begin(10, 10)

    def step(number, seconds=2.0):
        clock[0] += seconds
        run = SimpleNamespace(steps=number, resumed_at=50, best_epoch=None)
        module = SimpleNamespace(training_losses=[1.0])
        progress.acestep_step_finished(SimpleNamespace(training=True, loss=1.0, module=module, run=run))

    step.progress = progress
    return step


def test_the_time_left_counts_the_steps_that_were_computed(stepping, capsys):
    for number in range(51, 61):
        stepping(number, 60.0 if number == 51 else 2.0)  # setting up is no part of the rate
    line = capsys.readouterr().out.splitlines()[-1]
    assert line == "step 60/100, epoch 6/10, loss (smoothed) 1.0000, 0.50 steps/s, 0:01:18 elapsed, 0:01:20 left"


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        (120, "epoch 6/10, loss (smoothed) 1.0000, 0.50 steps/s, 0:00:20 elapsed, 0:01:20 left"),
        (100, "epoch 6/10, loss (smoothed) 1.0000, 0:00:20 elapsed, 0:01:20 left"),
        (80, "epoch 6/10, loss (smoothed) 1.0000, 0:01:20 left"),
        (60, "epoch 6/10, loss (smoothed) 1.0000"),
    ],
)
def test_the_bar_shows_what_fits_into_its_line(stepping, monkeypatch, columns, says):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(showing.sys.stdout, "isatty", lambda: True, raising=False)
    shown = []
    stepping.progress.begin(10, 10)
    stepping.progress._bar.render_progress = lambda: shown.append(stepping.progress._bar.format_progress_line())
    for number in range(51, 61):
        stepping(number)
    assert shown[-1].endswith(f"]  60/100  {says}") and len(shown[-1]) < max(columns, 65)


def test_the_total_is_told_at_the_end(stepping, capsys):
    for number in range(51, 101):
        stepping(number)
    stepping.progress.end()
    assert capsys.readouterr().out.splitlines()[-1] == "Total time: 0:01:40 for 50 training steps"


def demo(tmp_path, **streams):
    return subprocess.Popen([*COMMAND, "demo", "--dir", str(tmp_path / "demo")], text=True, encoding="utf-8", **streams)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="closes a POSIX pipe")
def test_a_training_that_somebody_looked_at_for_a_line_has_done_its_job(tmp_path):
    """``acestep-train ... | head -1``"""
    with demo(tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        errors = process.stderr.read()
        assert process.wait(timeout=120) == 0, errors
    assert "Error" not in errors and "Broken pipe" not in errors and "Exception" not in errors
    assert (tmp_path / "demo/output/base-lora/final/adapter/training_config.json").is_file()


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is always full")  # noqa: PTH110
def test_a_full_disk_under_what_is_printed_costs_no_training(tmp_path):
    with open("/dev/full", "w") as full, demo(tmp_path, stdout=full, stderr=subprocess.PIPE) as process:  # noqa: PTH123
        errors = process.stderr.read()
        assert process.wait(timeout=120) == 0, errors
    assert re.search("Error|Exception|No space", errors) is None
    assert (tmp_path / "demo/output/base-lora/final/adapter/training_config.json").is_file()


@pytest.mark.parametrize(("seconds", "said"), [(6.0, 1), (1.0, 0)])
def test_what_an_epoch_takes_is_said_once_after_ten_steps(stepping, capsys, seconds, said):
    """If a minute or more is left: 39 steps here."""
    for number in range(51, 81):
        stepping(number, seconds)
    out = capsys.readouterr().out
    assert out.count("Time: about") == said
    assert ("Time: about 0:01:00 per epoch, 0:03:54 left (10 steps took 0:01:00)" in out) is bool(said)


def test_the_best_epoch_is_in_the_bar():
    progress = Progress()
    progress.begin(10, 10)
    assert "best epoch" not in progress._status()
    progress.best_epoch = 3
    assert "best epoch 3" in progress._status() and "best epoch 3" not in progress._status(room=40)
