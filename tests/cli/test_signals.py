"""The signals that terminals, schedulers and shutdowns send: what each does to a training and to other commands."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from conftest import COMMAND, running, without_training_packages

from sidestep_plugin import signals
from sidestep_plugin.cli import COMMANDS, cli, interrupts

if os.name == "nt":
    pytest.skip("sends POSIX signals", allow_module_level=True)

SENT = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGXCPU")]


@pytest.fixture
def found():
    """Handlers as a program finds them that nobody has prepared; put back afterwards."""
    before = {number: signal.getsignal(number) for number in signals.ENDING}
    for number in signals.ENDING:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


# -- taking signals over ---------------------------------------------------------------------------------------------


def test_what_is_ignored_stays_ignored(found):
    """nohup ignores SIGHUP, a script's ``command &`` ignores SIGINT and SIGQUIT."""
    got = []
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with signals.taken_over(lambda number, _: got.append(number)):
        for number in signals.ENDING:
            signal.raise_signal(number)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    assert set(got) == set(signals.ENDING) - {signal.SIGHUP}
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_somebody_elses_program_gets_the_handlers_of_the_start(found):
    with signals.taken_over(lambda *_: None), signals.taken_over(lambda *_: None):
        with signals.given_back():
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert callable(signal.getsignal(signal.SIGTERM))
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.fixture
def stop(found, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    said = []
    launch = SimpleNamespace(state={"should_stop": False}, total_steps=4)
    made = interrupts.Stop(launch, SimpleNamespace(say=said.append, step=3, computes=True))
    made.said = said
    with signals.taken_over(made):
        yield made


@pytest.mark.parametrize("number", [signal.SIGINT, *SENT])
def test_each_of_them_presses_the_stop_button(stop, number):
    signal.raise_signal(number)
    assert stop.asked and stop._launch.state["should_stop"]
    (line,) = stop.said
    assert line.startswith("Stopping after this step, and saving.")
    assert ("Press Ctrl-C again" in line) == (number in (signal.SIGINT, signal.SIGQUIT))


def test_several_signals_of_one_event_are_one(stop):
    """A terminal that is closed sends SIGHUP more than once, and systemd SIGTERM and SIGHUP together."""
    for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM, signal.SIGHUP, signal.SIGXCPU, signal.SIGXCPU):
        signal.raise_signal(number)
    assert len(stop.said) == 1
    with pytest.raises(KeyboardInterrupt):  # somebody is there after all, and does not want to wait
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("number", [signal.SIGINT, *SENT])
def test_before_the_first_step_each_of_them_ends_it_at_once(stop, number):
    """Whatever is being made then, such as clips of the base model, nobody will need it."""
    stop._progress.computes = False
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(number)
    assert stop.asked and stop.said == []


def test_there_is_no_step_to_stop_after_when_all_are_done(stop):
    stop._progress.step = 4
    signal.raise_signal(signal.SIGINT)
    assert stop.said == ["All steps are done; what is left is to save. Press Ctrl-C again to stop at once."]


@pytest.mark.parametrize("before", [(), (signal.SIGINT,)])
def test_a_training_that_has_said_that_it_is_complete_cannot_be_interrupted_any_more(stop, monkeypatch, before):
    """Its adapter is saved. Only who asked twice does not get to see the last lines."""
    for number in before:
        signal.raise_signal(number)
    ended, said = [], list(stop.said)
    monkeypatch.setattr(interrupts.os, "_exit", ended.append)
    stop.complete = True
    signal.raise_signal(signal.SIGTERM)
    assert stop.said == said and not ended
    signal.raise_signal(signal.SIGINT)
    assert stop.said == said and ended == [0]


def test_a_signal_in_the_middle_of_a_line_does_not_fail_the_training(stop, capfd):
    def cannot(_):
        raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stdout>'>")

    stop._progress.say = cannot
    signal.raise_signal(signal.SIGTERM)
    assert stop.asked and "Stopping after this step" in capfd.readouterr().out


def test_a_forked_process_does_not_stop_for_its_parent(stop):
    child = os.fork()
    if child == 0:
        try:
            signal.raise_signal(signal.SIGINT)
            os._exit(7 if stop.asked or stop.said else 0)
        finally:
            os._exit(8)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.slow
def test_a_worker_that_reads_songs_goes_on_and_ends_with_its_training(tmp_path):
    """Schedulers signal every process of a job; the training still needs this one for its step."""
    program = tmp_path / "loads.py"
    program.write_text(
        "import os, signal, subprocess, torch\n"
        "from sidestep_plugin.signals import ignored_in_worker\n"
        "class Songs(torch.utils.data.Dataset):\n"
        "    def __len__(self): return 40\n"
        "    def __getitem__(self, index): return os.getpid()\n"
        "told = []\n"
        "loader = torch.utils.data.DataLoader(Songs(), num_workers=1, worker_init_fn=ignored_in_worker(print),\n"
        "    persistent_workers=True, multiprocessing_context='fork')\n"
        "songs = iter(loader)\n"
        "worker = int(next(songs))\n"
        "for name in ('TERM', 'HUP', 'INT', 'USR1'):\n"
        "    subprocess.run(['kill', f'-{name}', str(worker)], check=True)\n"
        "print('read', 1 + sum(1 for _ in songs))\n",
        encoding="utf-8",
    )
    with running([sys.executable, program], stderr=subprocess.STDOUT) as process:
        out = process.communicate()[0]
    assert process.returncode == 0 and out.splitlines() == ["0", "read 40"], out


# -- every command ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_ends_with_one_line(found, monkeypatch, name, number):
    command = cli.get_command(None, name)
    for param in command.params:
        monkeypatch.setattr(param, "required", False)
    monkeypatch.setattr(command, "callback", lambda **_: signal.raise_signal(number), raising=False)
    words = {"run": ["--", "acestep"], "patch": ["show"]}.get(name, [])
    if name == "patch":
        monkeypatch.setattr(command.commands["show"], "callback", lambda **_: signal.raise_signal(number))
    done = CliRunner().invoke(cli, [name, *words])
    assert done.exit_code == 130, done.output
    before = " before the training began; nothing was saved" if name in ("train", "demo") else ""
    assert done.stderr == f"Interrupted{before}.\n" and done.stdout == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_before_the_first_line(tmp_path, number):
    """In the middle of an import, where Python would print where it was."""
    (tmp_path / "click.py").write_text(
        "import os, signal, time\n"
        f"os.kill(os.getpid(), {int(number)})\n"
        "time.sleep(60)\n",
        encoding="utf-8",
    )  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    line = [sys.executable, "-m", "sidestep_plugin", "plugins"]
    with running(line, stderr=subprocess.PIPE, env=environment, preexec_fn=_listening) as process:
        out, errors = process.communicate()
    assert (process.returncode, out, errors) == (130, "", "Interrupted.\n")


def test_ctrl_c_in_the_very_first_import():
    """Of what takes the signals over, before it could."""
    code = (
        "import os, signal, sys\n"
        "from sidestep_plugin.__main__ import main\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'sidestep_plugin.signals': signal.raise_signal(signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "sys.argv[1:] = ['plugins']\n"
        "main()\n"
    )
    with running([sys.executable, "-c", code], stderr=subprocess.PIPE, preexec_fn=_listening) as process:
        out, errors = process.communicate()
    assert (process.returncode, out, errors) == (130, "", "Interrupted.\n")


def test_next_to_nothing_is_imported_before_ctrl_c_is_taken_over():
    """What Python has imported by then shows where it was when Ctrl-C is pressed."""
    code = (
        "import __future__, importlib, os, signal, sys\n"
        "before = set(sys.modules)\n"
        "import sidestep_plugin.__main__\n"
        "print(*sorted(set(sys.modules) - before))\n"
    )
    line = [sys.executable, "-S", "-c", code]  # without site, which imports what the environment happens to need
    environment = os.environ | {"PYTHONPATH": str(Path(signals.__file__).parents[1])}
    done = subprocess.run(line, capture_output=True, text=True, encoding="utf-8", env=environment)
    assert done.stdout.split() == ["sidestep_plugin", "sidestep_plugin.__main__"], done.stderr


def test_ctrl_c_while_python_ends_changes_nothing_of_how_it_ended():
    """Python puts its own handlers back at its very end, and the one for Ctrl-C would end it by the signal."""
    code = (
        "import signal, sys\n"
        "from sidestep_plugin.cli import main\n"
        "class Last:\n"
        "    def __del__(self, end=signal.raise_signal, number=signal.SIGINT): end(number)\n"
        "sys.kept = Last()\n"
        "sys.argv[1:] = ['schedule']\n"
        "main()\n"
    )
    with running([sys.executable, "-c", code], stderr=subprocess.PIPE, preexec_fn=_listening) as process:
        out, errors = process.communicate()
    assert (process.returncode, errors) == (0, "") and "0.9545" in out


def test_a_signal_inside_of_exec_is_no_death_by_sigint():
    """Python would end the program by SIGINT at its very end, because a KeyboardInterrupt once came out of exec."""
    code = (
        "import signal, sys\n"
        "from sidestep_plugin.cli import cli, main\n"
        "command = cli.get_command(None, 'schedule')\n"
        "command.callback = lambda **_: exec('import signal; signal.raise_signal(signal.SIGINT)')\n"
        "sys.argv[1:] = ['schedule']\n"
        "main()\n"
    )
    line = [sys.executable, "-c", code]
    with running(line, stderr=subprocess.PIPE, preexec_fn=_listening) as process:
        _, errors = process.communicate()
    assert (process.returncode, errors) == (130, "Interrupted.\n")


def test_a_program_that_is_run_is_ended_as_without_us(tmp_path):
    program = tmp_path / "serve.py"
    program.write_text("import signal\nprint(signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)\n", encoding="utf-8")
    line = [*COMMAND, "run", "--", str(program)]
    done = subprocess.run(
        line, capture_output=True, text=True, encoding="utf-8", env=without_training_packages(os.environ)
    )
    assert done.returncode == 0 and done.stdout == "True\n", done.stderr


def _listening():
    """In the new process: a test run that was started in the background ignores SIGINT, and this one would, too."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


# -- whole trainings -------------------------------------------------------------------------------------------------

EPOCHS = 80


@pytest.fixture
def line(checkout, tmp_path):
    """A training in a process of its own: ``line("--num-workers", 2)``."""
    if checkout.real:
        pytest.skip("a process of its own imports the checkout's own environment")

    def make(*more, output="output"):
        words = ["--plugin", "sidestep", "--model", "base", "--device", "cpu", "--acestep-root", checkout.root]
        words += ["--checkpoint-dir", checkout.checkpoints, "--dataset-dir", checkout.tensors, "--batch-size", 1]
        words += ["--rank", 4, "--alpha", 8, "--epochs", EPOCHS, "--save-every", EPOCHS, "--yes"]
        return [str(word) for word in (*COMMAND, *words, "--output-dir", tmp_path / output, *more)]

    return make


def resumed_is_whole(line, tmp_path):
    """Whether the training resumed from ``interrupted`` gives the adapter of one that was not stopped."""
    import torch
    from safetensors.torch import load_file

    for words in (line("--resume-from", "latest"), line(output="whole")):
        done = subprocess.run(words, capture_output=True, text=True, encoding="utf-8")
        assert done.returncode == 0, done.stdout + done.stderr
    ours, its = (
        load_file(tmp_path / name / "final" / "adapter" / "adapter_model.safetensors") for name in ("output", "whole")
    )
    return ours.keys() == its.keys() and all(torch.equal(ours[key], its[key]) for key in its)


@pytest.mark.slow
def test_a_closed_terminal_saves_the_training(line, tmp_path):
    """Nobody can read any more what it says, and a line that cannot be printed must not end it."""
    from terminal import close_a_terminal

    assert close_a_terminal(line(), r"epoch 3/", cwd=tmp_path) == 130
    assert (tmp_path / "output" / "interrupted" / "resume_state.pt").is_file()
    assert not (tmp_path / "output" / "final").exists()
    assert resumed_is_whole(line, tmp_path)


@pytest.mark.slow
def test_a_closed_terminal_of_a_shell_saves_the_training(line, tmp_path):
    """The shell ends, too, so nobody but the training itself sees how it ends."""
    from terminal import close_a_terminal

    code = close_a_terminal(["bash", "-c", f"{shlex.join(line())}; true"], r"epoch 3/", cwd=tmp_path)
    assert code == -signal.SIGHUP
    output, deadline = tmp_path / "output", time.monotonic() + 60.0
    while (output / ".training_lock").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert (output / "interrupted" / "resume_state.pt").is_file() and not (output / "final").exists()


@pytest.mark.slow
def test_a_terminal_that_is_closed_without_a_signal_ends_nothing(line, tmp_path):
    """Every line that the training prints fails from then on."""
    from terminal import close_a_terminal

    close_a_terminal(["bash", "-c", f"trap : HUP; {shlex.join(line())}; echo $? > code.txt"], r"epoch 3/", cwd=tmp_path)
    assert (tmp_path / "code.txt").read_text() == "0\n"
    assert (tmp_path / "output" / "final").is_dir()


@pytest.mark.slow
def test_a_training_under_nohup_goes_on_when_its_terminal_is_closed(line, tmp_path):
    from terminal import close_a_terminal

    command = f"nohup {shlex.join(line())} > log.txt 2>&1; echo $? > code.txt"
    waits = "until grep -q 'epoch 3/' log.txt; do sleep 0.1; done; echo it trains"
    shell = ["bash", "-c", f"trap : HUP; ({command}) & ({waits}); wait; wait"]
    close_a_terminal(shell, r"it trains", cwd=tmp_path)
    assert (tmp_path / "code.txt").read_text() == "0\n", (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert (tmp_path / "output" / "final").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGXCPU])
def test_a_signal_saves_the_training(line, tmp_path, number):
    with running(line(), stderr=subprocess.STDOUT) as process:
        next(text for text in process.stdout if "epoch 3/" in text)
        process.send_signal(number)
        out = process.communicate()[0]
    assert process.returncode == 130 and "Saved as it was after" in out, out
    assert len(re.findall(r"^To resume:\n  acestep-train ", out, flags=re.MULTILINE)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_to_all_processes_of_a_job_saves_the_training(line, tmp_path, number):
    """Also those that read its songs."""
    words = line("--num-workers", 2)
    with running(words, stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=_listening) as process:
        next(text for text in process.stdout if "epoch 3/" in text)
        os.killpg(process.pid, number)
        out = process.communicate()[0]
    assert process.returncode == 130 and "Saved as it was after" in out, out
    assert out.count("Stopping after this step") == 1 and "DataLoader worker" not in out
    words = line("--num-workers", 2, "--resume-from", "latest")
    done = subprocess.run(words, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0 and "✅ Resumed" in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("moment", ["Importing torch", "Loading acestep"])
def test_a_signal_while_it_loads_leaves_nothing(line, tmp_path, number, moment):
    with running(line(), stderr=subprocess.PIPE) as process:
        next(text for text in process.stdout if moment in text)
        process.send_signal(number)
        _, errors = process.communicate()
    assert (process.returncode, errors) == (130, "Interrupted before the training began; nothing was saved.\n")
    assert not (tmp_path / "output").exists()
