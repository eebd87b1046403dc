"""The programs that other tests talk to: a deadline that passes is a failure, and Ctrl-C always arrives."""

from __future__ import annotations

import os
import signal
import sys

import pytest

if os.name == "nt":
    pytest.skip("needs a pseudo-terminal", allow_module_level=True)

from conftest import running
from terminal import CTRL_C, in_a_terminal


def test_a_command_that_does_not_end_fails_the_test(tmp_path):
    note = tmp_path / "pid"
    code = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); print('here'); time.sleep(600)"
    with pytest.raises(AssertionError, match=r"still running after 2 s; .*here"):
        in_a_terminal([sys.executable, "-c", code, note], [], cwd=tmp_path, timeout=2)
    with pytest.raises(ProcessLookupError):
        os.kill(int(note.read_text()), 0)


def test_a_pattern_that_does_not_come_fails_the_test(tmp_path):
    with pytest.raises(AssertionError, match="never seen: 'Name: '"):
        in_a_terminal([sys.executable, "-c", "print('bye')"], [("Name: ", "x")], cwd=tmp_path)


def test_ctrl_c_arrives_even_when_the_tests_run_in_the_background(tmp_path):
    """``command &`` in a script makes the command ignore SIGINT, and its children inherit that."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        seen = in_a_terminal(
            [sys.executable, "-c", "import time; print('ready'); time.sleep(600)"],
            [("ready", CTRL_C)],
            cwd=tmp_path,
            timeout=60,
        )
    finally:
        signal.signal(signal.SIGINT, before)
    assert "KeyboardInterrupt" in seen.text and seen.code == -signal.SIGINT


def test_a_process_that_a_test_talks_to_never_outlives_it():
    line = [sys.executable, "-c", "import time; print('here', flush=True); time.sleep(600)"]
    with pytest.raises(AssertionError, match="still running after 2 s, and killed"), running(line, seconds=2) as late:
        assert late.stdout.readline() == "here\n"
        late.wait()
    assert late.returncode == -signal.SIGKILL
    with pytest.raises(KeyError), running(line) as left:
        raise KeyError
    assert left.returncode == -signal.SIGKILL


def test_a_ctrl_c_that_comes_too_early_is_typed_again(tmp_path):
    """The command under test notices the second one only, as Python's ``input`` may."""
    code = (
        "import signal, time\n"
        "def again(*_): signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "signal.signal(signal.SIGINT, again)\n"
        "print('ready')\n"
        "time.sleep(600)\n"
    )
    seen = in_a_terminal([sys.executable, "-c", code], [("ready", CTRL_C)], cwd=tmp_path, timeout=60)
    assert "KeyboardInterrupt" in seen.text and seen.code == -signal.SIGINT
