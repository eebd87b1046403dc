"""Several trainings one after the other, each with its own settings file: ``acestep-train --queue a.toml b.toml``."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click

from sidestep_plugin import signals
from sidestep_plugin.errors import Refusal
from sidestep_plugin.options import Place
from sidestep_plugin.text import counted, hours, shown

from .commands import FAILED, INTERRUPTED, UNUSABLE
from .settings_file import SettingsFile
from .terminal import let_go, say

_ENDINGS: Final = {
    0: "finished",
    FAILED: "failed",
    UNUSABLE: "refused, nothing was trained",
    INTERRUPTED: "stopped and saved",
}
_NOT_STARTED: Final = "not started"


def files_in(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """The files behind ``--queue``, which takes all words up to the next option, and the other words."""
    files: list[str] = []
    rest: list[str] = []
    queue = False
    for word in args:
        if word == "--queue":
            queue = True
        elif word.startswith("--queue="):
            queue = True
            files.append(word.partition("=")[2])
        elif queue and not word.startswith("-"):
            files.append(word)
        else:
            queue = False
            rest.append(word)
    return files, rest


@dataclass
class _Training:
    """One training of the queue."""

    file: str
    output: str
    ending: str = _NOT_STARTED
    seconds: float = 0.0

    def line(self, width: int) -> str:
        took = "" if self.ending == _NOT_STARTED else f", {hours(self.seconds)}"
        where = f": {Path(self.output) / 'final'}" if self.ending == _ENDINGS[0] and self.output else ""
        return f"  {shown(self.file, 200):<{width}}  {self.ending}{took}{where}"


def run_queue(files: Sequence[str], words: Sequence[str]) -> int:
    """Do one training after the other, each in a process of its own. The next one starts whatever became of the last.

    Args:
        files: their settings files.
        words: the command line's other words, for each of them.

    Returns:
        The exit code: 0 if all are finished, 130 after a signal, else 1.

    Raises:
        Refusal: a file is not there, or is no settings file; nothing was trained.
    """
    if "--config" in words or any(word.startswith("--config=") for word in words):
        raise Refusal("--queue names the settings files. Leave --config out.")
    read = [SettingsFile.read(name) for name in files]
    trainings = [
        _Training(name, str(file.values.get("output_dir", ""))) for name, file in zip(files, read, strict=True)
    ]
    runner = _Runner()
    with signals.taken_over(runner.on_signal):
        for number, training in enumerate(trainings, start=1):
            if runner.asked:
                break
            say(f"--- Training {number} of {len(trainings)}: {shown(training.file, 200)}")
            began = time.monotonic()
            line = [sys.executable, "-m", "sidestep_plugin", "train", *words, "--config", training.file, "--yes"]
            code = runner.run(line)
            training.ending = _ENDINGS.get(code, f"ended with exit code {code}")
            training.seconds = time.monotonic() - began
    finished = sum(training.ending == _ENDINGS[0] for training in trainings)
    say(f"--- {finished} of {counted(len(trainings), 'training')} finished")
    width = max(len(shown(training.file, 200)) for training in trainings)
    for training in trainings:
        say(training.line(width))
    if runner.asked:
        return INTERRUPTED
    return 0 if finished == len(trainings) else FAILED


class _Runner:
    """Runs one process at a time and hands signals on to it.

    Attributes:
        asked: whether a signal has asked to end.
    """

    def __init__(self) -> None:
        self.asked = False
        self._running: subprocess.Popen[bytes] | None = None

    def run(self, line: Sequence[str]) -> int:
        """Run a process to its end. Returns its exit code, as a shell has it."""
        # A terminal's Ctrl-C comes here and is handed on once.
        self._running = subprocess.Popen(line, start_new_session=os.name != "nt")
        try:
            code = self._running.wait()
        finally:
            self._running.kill()
            self._running = None
        return code if code >= 0 else 128 - code

    def on_signal(self, number: int, _: Any) -> None:
        let_go()
        self.asked = True
        if self._running is not None and os.name != "nt":  # there it reaches every process of the console
            self._running.send_signal(number)


def queue_option(function: Any) -> Any:
    """``--queue FILE.toml ...``, which :func:`files_in` takes out of the command line."""
    text = "Do several trainings one after the other, each with its own settings file."
    return click.option("--queue", multiple=True, type=Place(), metavar="FILE.toml ...", help=text)(function)
