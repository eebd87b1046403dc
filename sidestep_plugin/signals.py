"""The signals that ask a program to end, and taking them over for a while.

Terminals send SIGINT (Ctrl-C), SIGQUIT (Ctrl-\\), and SIGHUP when they are closed, often several times. Shutdowns,
containers and schedulers send SIGTERM, or what they were told to send before the time is up: SIGUSR1, SIGUSR2 (Slurm,
Grid Engine, LSF), SIGXCPU (a limit of CPU time), SIGPWR (a power failure). Windows has SIGBREAK. All of them end a
program that does nothing about them. Imported before anything else, so it imports next to nothing.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

INTERRUPTED: Final = 130
"""Exit code of a program that one of these signals has ended, whichever it was."""

ENDING: Final = tuple(
    getattr(signal, name)
    for name in (
        "SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGPWR", "SIGBREAK",
    )
    if hasattr(signal, name)
)  # fmt: skip
"""Those that this system has."""

TYPED: Final = frozenset(getattr(signal, name) for name in ("SIGINT", "SIGQUIT", "SIGBREAK") if hasattr(signal, name))
"""Those that somebody types. The others may come more than once for one event, such as a terminal that is closed."""


class Interrupted(KeyboardInterrupt):
    """What a handler raises to end what runs.

    A class of its own: Python ends a program by SIGINT, whatever it does about it, if a KeyboardInterrupt itself comes
    out of ``exec`` (which dataclasses and named tuples use).
    """


Handler = Callable[[int, Any], Any]

_as_found: Final[dict[int, Any]] = {}
"""What the first of them has found: the handlers of a program that did not take anything over."""


def take_over(handler: Handler | signal.Handlers) -> dict[int, Any]:
    """Let a function handle these signals from now on.

    A signal that was ignored when the program was started, as by nohup or in the background of a script, stays ignored,
    and so does one that is handled outside of Python. Does nothing outside of the main thread, which alone may set
    handlers.

    Args:
        handler: called with the signal's number and the frame, in the main thread; or SIG_IGN.

    Returns:
        The handlers that were there before, by signal.
    """
    before: dict[int, Any] = {}
    with suppress(ValueError):
        for number in ENDING:
            if (found := signal.getsignal(number)) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, handler)
                _as_found.setdefault(number, found)
    return before


@contextmanager
def taken_over(handler: Handler) -> Iterator[None]:
    """The same until the block ends, with its rules."""
    outermost = not _as_found
    before = take_over(handler)
    try:
        yield
    finally:
        for number, found in before.items():
            signal.signal(number, found)
        if outermost and before:
            _as_found.clear()


@contextmanager
def given_back() -> Iterator[None]:
    """Run somebody else's program with the handlers that this one was started with."""
    now = {number: signal.signal(number, found) for number, found in _as_found.items()}
    try:
        yield
    finally:
        for number, handler in now.items():
            signal.signal(number, handler)


def in_child(number: int) -> None:
    """What a handler does in a process that was forked from the one that it was made for: nothing, or end it.

    A terminal's signals go to both, and the other one ends this one in time. SIGTERM is how it does that.
    """
    if number == signal.SIGTERM:
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)


def leave(number: int, frame: Any) -> None:
    """Handler for the time in which there is nothing to clean up: say a word and end, in the middle of an import."""
    if speaks():
        tell("Interrupted.")
    os._exit(INTERRUPTED)


def speaks() -> bool:
    """Whether this process says what all processes of a training on this machine have to say."""
    return os.environ.get("LOCAL_RANK", "0").strip() in ("", "0")


def tell(text: str, descriptor: int = 2) -> None:
    """Write a line from a handler, where the streams may be in the middle of another one."""
    with suppress(OSError):  # nobody reads it
        os.write(descriptor, f"{text}\n".encode())


def ignored_in_worker(before: Callable[[int], Any] | None) -> IgnoredInWorker:
    """What a loader's worker process does first: see :class:`IgnoredInWorker`."""
    return before if isinstance(before, IgnoredInWorker) else IgnoredInWorker(before)


class IgnoredInWorker:
    """Lets a worker process that reads songs ignore these signals. A class, so that it can be sent to a new process.

    Terminals and schedulers send a signal to all processes. A worker that ended at once would take the training with
    it, which wants to finish its step. SIGTERM is also how the training ends a worker, so the sender decides about it;
    systems that do not tell who that was (macOS) leave it to torch, and the worker ends.

    Args:
        before: what the loader was to call first, with the worker's number.
    """

    def __init__(self, before: Callable[[int], Any] | None) -> None:
        self._before = before

    def __call__(self, worker: int) -> None:
        for number in ENDING:
            if number != signal.SIGTERM:
                signal.signal(number, signal.SIG_IGN)
        if hasattr(signal, "sigwaitinfo"):
            import threading

            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            threading.Thread(target=_end_for, args=(os.getppid(),), name="acestep-signals", daemon=True).start()
        if self._before is not None:
            self._before(worker)


def _end_for(parent: int) -> None:
    """Wait for a SIGTERM of the process that started this one, and end."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
