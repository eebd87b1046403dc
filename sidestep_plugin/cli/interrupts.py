"""Signals that ask to end: they end a training after the running step, and everything else at once, with one line."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import click

from sidestep_plugin import signals
from sidestep_plugin.ranks import ranks

from .commands import INTERRUPTED
from .terminal import let_go, say

if TYPE_CHECKING:
    from sidestep_plugin.launch.launch import Launch

    from .progress import Progress

AT_ONCE: Final = "Stopped at once. Checkpoints that were saved before are complete."
BEFORE_THE_FIRST_STEP: Final = "Interrupted before the first step; nothing was saved."

_TRAIN: Final = frozenset({"train", "demo"})
_BEGAN: Final = "sidestep_plugin.training_began"
_ONE_EVENT: Final = 1.0  # seconds in which a closed terminal or a shutdown may send more than one signal


class _Raise:
    """Ends what runs by an exception, as Ctrl-C does in any program, so that it can clean up.

    If that takes long, a second Ctrl-C ends the program without.
    """

    def __init__(self) -> None:
        self._pid, self._asked_at = os.getpid(), 0.0

    def __call__(self, number: int, frame: Any) -> None:
        if os.getpid() != self._pid:
            return signals.in_child(number)
        before, self._asked_at = self._asked_at, self._asked_at or time.monotonic()
        let_go()
        if before and number in signals.TYPED:
            signals.leave(number, frame)
        if not before or time.monotonic() - before > _ONE_EVENT:
            raise signals.Interrupted


@contextmanager
def ended_by_signals(context: click.Context) -> Iterator[None]:
    """Let signals end a command at once, with one line on standard error and exit code 130."""
    with signals.taken_over(_Raise()):
        try:
            yield
        except (KeyboardInterrupt, click.Abort):
            before = context.invoked_subcommand in _TRAIN and not context.meta.get(_BEGAN)
            ends = " before the training began; nothing was saved" if before else ""
            if signals.speaks():
                say(f"Interrupted{ends}.", err=True)
            context.exit(INTERRUPTED)


@contextmanager
def interruptible(launch: Launch, progress: Progress) -> Iterator[Stop]:
    """Let signals end the training after the running step; before the first one, and a second Ctrl-C, at once."""
    if (context := click.get_current_context(silent=True)) is not None:
        context.meta[_BEGAN] = True
    stop = Stop(launch, progress)
    with signals.taken_over(stop):
        try:
            yield stop
        except KeyboardInterrupt:
            say(AT_ONCE if progress.computes else BEFORE_THE_FIRST_STEP, err=True)
            sys.exit(INTERRUPTED)


class Stop:
    """Presses the training's stop button.

    Attributes:
        asked: whether a signal has come.
        complete: to be set once the training has said that it is complete: nothing can be stopped any more.
    """

    def __init__(self, launch: Launch, progress: Progress) -> None:
        self.asked = self.complete = False
        self._launch, self._progress = launch, progress
        self._pid, self._several = os.getpid(), ranks().several

    def __call__(self, number: int, frame: Any) -> None:
        if os.getpid() != self._pid:
            return signals.in_child(number)
        let_go()
        before, self.asked = self.asked, True
        if self.complete:
            if before and number in signals.TYPED:
                os._exit(0)
            return None
        self._launch.state["should_stop"] = True
        if self._several:  # all of them stop after the same step; whoever started them ends them at once if asked to
            self._launch.state["interrupted"] = True
        elif not self._progress.computes:  # there is nothing to save
            raise signals.Interrupted
        elif not before:
            again = " Press Ctrl-C again to stop at once." if number in signals.TYPED else ""
            done = self._progress.step >= self._launch.total_steps
            what = "All steps are done; what is left is to save." if done else "Stopping after this step, and saving."
            _say(self._progress, f"{what}{again}")
        elif number in signals.TYPED:
            signal.signal(number, signal.SIG_DFL)
            raise signals.Interrupted


def _say(progress: Progress, text: str) -> None:
    try:
        progress.say(text)
    except RuntimeError:  # the signal came while a line was being printed, and Python does not print two at once
        signals.tell(text, 1)
