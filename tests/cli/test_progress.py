"""What is shown of a training as it goes: names, times, and that nobody has to look."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
from conftest import COMMAND
from terminal import as_seen

from sidestep_plugin.cli import progress as showing
from sidestep_plugin.cli import terminal as terminal_module
from sidestep_plugin.cli.progress import Progress
from sidestep_plugin.cli.terminal import ErrorOfUsage
from sidestep_plugin.clock import Clock


@pytest.fixture
def clock(monkeypatch):
    """Seconds that go by when the test says so."""
    now = [100.0]
    monkeypatch.setattr(showing.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def stepping(clock):
    """A resumed training of 100 steps in 10 epochs, of which 50 were done: ``step(51)``."""
    progress, time = Progress(), Clock()
    progress.begin(10, 10)

    def step(number, seconds=2.0, paused=0.0):
        clock[0] += seconds
        time.stepped(paused)
        run = SimpleNamespace(steps=number, resumed_at=50, best_epoch=None, clock=time)
        module = SimpleNamespace(training_losses=[1.0])
        progress.acestep_step_finished(SimpleNamespace(training=True, loss=1.0, module=module, run=run))

    step.progress, step.clock = progress, time
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


def test_what_is_saved_at_the_end_is_in_the_bar_and_in_the_total(stepping, clock, terminal, capsys):
    """One clock: the bar that stays on the screen says the time that the line below it says."""
    terminal(140)
    stepping.progress.begin(10, 10)
    for number in range(51, 101):
        stepping(number)
    clock[0] += 5.5  # the adapter is saved
    stepping.clock.stop()
    clock[0] += 2.0  # the page is drawn
    stepping.progress.end()
    bar, total = as_seen(capsys.readouterr().out).splitlines()[-2:]
    assert "0:01:45 elapsed" in bar and "0.50 steps/s" in bar
    assert total == "Total time: 0:01:45 for 50 training steps"


def test_the_time_left_ends_with_the_time_limit(stepping, clock):
    stepping.clock.ends_at = clock[0] + 30.0
    stepping(51), stepping(52), stepping(53)
    assert "0:00:24 left" in stepping.progress._status(), "and not the 0:01:34 that 47 steps need"


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


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_the_sign_of_ctrl_c_that_a_terminal_shows_behind_the_bar_is_wiped_out(stepping, terminal, capsys, columns):
    """Beyond the last column it would begin a new line, and the bar would stay above."""
    terminal(columns)
    stepping.progress.begin(10, 10)
    for number in range(51, 101):
        stepping(number)
    drawn = as_seen(capsys.readouterr().out).splitlines()[-1]
    stepping.progress.say("Stopping after this step.")
    assert len(f"{drawn}^C") < columns
    assert capsys.readouterr().out.startswith(f"\r{' ' * (columns - 1)}\rStopping")


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
    progress._run = SimpleNamespace(best_epoch=3)  # validation after the last step
    assert "best epoch 3" in progress._status() and "best epoch 3" not in progress._status(room=40)


# -- on a terminal ---------------------------------------------------------------------------------------------------


@pytest.fixture
def terminal(monkeypatch):
    """A terminal of so many columns: ``terminal(80)``."""

    def of(columns):
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setattr(showing.sys.stdout, "isatty", lambda: True, raising=False)

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    return of


@pytest.mark.parametrize("columns", [60, 80, 120, 200])
def test_the_bar_takes_the_room_that_the_words_leave(stepping, terminal, capsys, columns):
    terminal(columns)
    stepping.progress.begin(10, 10)
    for number in range(51, 61):
        stepping(number)
    line = as_seen(capsys.readouterr().out).splitlines()[-1].rstrip()
    assert columns - 5 <= len(line) <= columns - 3  # with room for a longer number of steps, and for ^C
    assert re.search(r"\[#{3,}-{2,}\]  60/100  epoch 6/10, loss", line)


def test_the_learning_rate_and_the_memory_are_in_a_wide_bar(stepping, terminal):
    terminal(160)
    stepping.progress.begin(10, 10)
    stepping.progress.rate, stepping.progress.memory = 1e-4, 3 * 2**30
    stepping(51), stepping(52)
    assert "loss (smoothed) 1.0000, lr 1.0e-04, GPU 3.0 GiB, 0.50 steps/s" in stepping.progress._status()
    assert "lr" not in stepping.progress._status(60) and "left" in stepping.progress._status(60)


def test_what_is_waited_for_takes_the_place_of_the_bar(stepping, terminal, capsys):
    terminal(60)
    stepping.progress.begin(10, 10)
    stepping.progress.engine_waiting(None, "Validation", 3, 4)
    shown = capsys.readouterr().out.split("\r")[-1]
    assert re.fullmatch(r"Validation  \[#{28}-{10}\]  3/4", shown) and len(shown) == 57
    stepping.progress.say("A line")
    assert "0/100" not in capsys.readouterr().out, "the bar is not drawn over it"
    stepping.progress.engine_waiting(None, "Validation", 4, 4)
    assert "0/100" in capsys.readouterr().out.split("\r")[-1]


def test_a_pipe_gets_no_bar_and_no_colours(stepping, capsys):
    stepping.progress.engine_waiting(None, "Validation", 3, 4)
    stepping.progress.say("Warning: " + "a long line " * 30)
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "\x1b" not in out and "\r" not in out


def test_time_between_epochs_is_no_part_of_the_rate_and_one_of_the_time_left(stepping):
    stepping(51), stepping(52, paused=1.0)
    assert "1.00 steps/s" in stepping.progress._status() and "0:01:36 left" in stepping.progress._status()


# -- lines -----------------------------------------------------------------------------------------------------------


def seen(text, terminal, columns=40):
    from sidestep_plugin.cli.terminal import for_people

    terminal(columns)
    return for_people(text, showing.sys.stdout)


def test_words_are_not_broken_and_commands_and_paths_stay_in_one_piece(terminal):
    words = "Timesteps: continuous, maximum of two logit-normal draws, mu -0.4"
    assert all(len(line) < 40 for line in seen(words, terminal).split("\n"))
    assert seen(words, terminal).replace("\n    ", " ") == words
    command = "To resume:\n  acestep-train --dataset-dir " + "x" * 60
    assert "x" * 60 in seen(command, terminal) and seen(command, terminal).count("\n") == 1
    page = f"Page: /home/{'x' * 40}/index.html (open it)"
    assert f"{'x' * 40}/index.html\n    (open it)" in seen(page, terminal)


def test_what_stands_behind_a_first_column_stays_behind_it(terminal):
    line = "  --epochs 800  ACE-Step's LoRA tutorial, for 10 to 20 songs, and its own example"
    assert seen(line, terminal).split("\n") == [
        "  --epochs 800  ACE-Step's LoRA",
        "                tutorial, for 10 to 20",
        "                songs, and its own",
        "                example",
    ]
    refused = "  No folder of songs there. Type the one that has the .pt files."
    assert seen(refused, terminal) == "  No folder of songs there. Type the\n    one that has the .pt files."
    command = f"  acestep-train --model base --dataset-dir {'x' * 40}"
    assert seen(command, terminal) == command


def test_an_error_of_usage_looks_like_any_other(terminal, monkeypatch, capsys):
    said = "Name the folder of audio, or finished songs with --renew DIR: one of the two."
    error = ErrorOfUsage(click.UsageError(said))
    error.show()
    assert capsys.readouterr().err == f"Error: {said}\n"
    terminal(40)
    monkeypatch.setattr(showing.sys.stderr, "isatty", lambda: True, raising=False)
    error.show()
    shown = capsys.readouterr().err
    assert shown.startswith("\x1b[31m\x1b[1mError: Name") and all(len(line) < 40 for line in as_seen(shown).split("\n"))
    assert " ".join(as_seen(shown).split()) == f"Error: {said}"


def test_a_path_that_fits_gets_a_line_of_its_own(terminal):
    saved = "💾 Saved as it was after 9 training steps: /home/somebody/out/interrupted"
    assert seen(saved, terminal, 60).split("\n") == [
        "💾 Saved as it was after 9 training steps:",
        "    /home/somebody/out/interrupted",
    ]
    assert "\n" not in seen(f"Page: /home/{'x' * 60}/index.html", terminal, 60)
    told = "Adapter: LoRA of rank 64 on q_proj, k_proj, v_proj, o_proj, 44,040,192 parameters"
    assert seen(told, terminal, 80).endswith("44,040,192\n    parameters\x1b[0m")


def test_commands_print_by_what_wraps():
    """Everything but JSON, the patch, a table of numbers, and what is drawn over."""
    sources = sorted(Path(terminal_module.__file__).parent.rglob("*.py"))
    echoing = {source.name for source in sources if "click.echo(" in source.read_text(encoding="utf-8")}
    assert echoing == {"commands.py", "compare.py", "patch.py", "progress.py", "schedule.py", "terminal.py"}


def test_important_lines_stand_out_unless_somebody_wants_no_colours(terminal, monkeypatch):
    for line, code in (("Error: x", 31), ("Adapter: x", 1), ("Loading x", 2)):
        assert seen(line, terminal).startswith(f"\x1b[{code}m") and seen(line, terminal).endswith("\x1b[0m")
    for line in ("Warning: x", "⚠️ x"):  # yellow letters cannot be read on a light ground: black on yellow can
        assert seen(line, terminal) == f"\x1b[30m\x1b[43m{line[:-2]}\x1b[0m x"
    assert seen("Note: x", terminal) == "Note: x"
    monkeypatch.setenv("NO_COLOR", "1")
    assert seen("Warning: x", terminal) == "Warning: x"
