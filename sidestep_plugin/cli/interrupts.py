"""Ctrl-C and SIGTERM: end a training after the running step, or the program before there is anything to save."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from sidestep_plugin.ranks import ranks

from .commands import INTERRUPTED
from .terminal import say

if TYPE_CHECKING:
    from sidestep_plugin.launch.launch import Launch

    from .progress import Progress


@contextmanager
def terminated_like_ctrl_c() -> Iterator[None]:
    """Let SIGTERM end the program like Ctrl-C, with a word and its exit code, before there is anything to save."""
    try:
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    except ValueError:  # only the main thread may set handlers
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def interruptible(launch: Launch, progress: Progress) -> Iterator[Callable[[], bool]]:
    """Let Ctrl-C and SIGTERM end the training after the running step; a second one ends it at once."""
    stopped, several = False, ranks().several

    def stop(signum: int, _: Any) -> None:
        nonlocal stopped
        if several:  # all of them stop after the same step; whoever started them ends them at once if asked to
            stopped = launch.state["should_stop"] = launch.state["interrupted"] = True
            return
        if stopped:
            for number in previous:
                signal.signal(number, signal.SIG_DFL)
            raise KeyboardInterrupt
        stopped = True
        launch.state["should_stop"] = True
        progress.say("Stopping after this step, and saving. Press Ctrl-C again to stop at once.")

    previous = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        with suppress(ValueError):  # only the main thread may set handlers
            previous[number] = signal.signal(number, stop)
    try:
        yield lambda: stopped
    except KeyboardInterrupt:
        say("Stopped at once. Checkpoints that were saved before are complete.", err=True)
        sys.exit(INTERRUPTED)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
