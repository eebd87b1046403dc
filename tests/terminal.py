"""Runs a command in a real terminal, types into it, and keeps what is seen (POSIX)."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

CTRL_C = "\x03"
ECHO = "^C"


@dataclass
class Seen:
    """What a person at the terminal saw, and the exit code."""

    text: str
    code: int


def in_a_terminal(
    line: Sequence[object], typed: Sequence[tuple[str, str]], *, cwd: Path, width: int = 110, timeout: float = 120.0
) -> Seen:
    """Run a command; wait for each pattern in what is printed since the last answer, and type what belongs to it.

    A typed text ends with Enter, except for control characters. Those are typed again every second until the command
    reacts, as a person would: Python misses a Ctrl-C that comes between its prompt and its waiting for input.

    Raises AssertionError when a pattern does not come, or the command has not ended after `timeout` seconds and was
    killed.
    """
    import pty

    leader, follower = pty.openpty()
    environment = os.environ | {"COLUMNS": str(width), "LINES": "60", "PYTHONUTF8": "1", "TERM": "xterm"}
    process = subprocess.Popen(
        [*map(str, line)],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        cwd=cwd,
        env=environment,
        start_new_session=True,
        preexec_fn=_as_a_shell_starts_it,
    )
    os.close(follower)
    seen, since, pressed = "", 0, ""
    waiting = list(typed)
    deadline = time.monotonic() + timeout
    try:
        while True:
            if waiting and re.search(waiting[0][0], seen[since:]):
                answer = waiting.pop(0)[1]
                since = len(seen)
                pressed = answer if answer and answer < " " else ""
                os.write(leader, (pressed or f"{answer}\n").encode())
            left = deadline - time.monotonic()
            assert left > 0, f"still running after {timeout:.0f} s; printed since the last answer: {seen[since:]!r}"
            if not select.select([leader], [], [], min(left, 1.0) if pressed else left)[0]:
                os.write(leader, pressed.encode())
                continue
            try:
                piece = os.read(leader, 65536)
            except OSError:  # the other side was closed
                break
            if not piece:
                break
            seen += piece.decode(errors="replace")
            pressed = "" if seen[since:].replace(ECHO, "").strip() else pressed
        code = process.wait(timeout=max(1.0, deadline - time.monotonic()))
    finally:
        os.close(leader)
        process.kill()  # does nothing to a process that has ended
        process.wait()
    assert not waiting, f"never seen: {waiting[0][0]!r} in {seen[since:]!r}"
    return Seen(as_seen(seen), code)


def close_a_terminal(line: Sequence[object], pattern: str, *, cwd: Path, timeout: float = 120.0) -> int:
    """Run a command, close its terminal when a pattern is printed, and wait until it has ended | returns its exit code.

    Raises AssertionError when the pattern does not come, or the command has not ended after `timeout` seconds and was
    killed.
    """
    import pty

    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [*map(str, line)],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        cwd=cwd,
        env=os.environ | {"COLUMNS": "110", "PYTHONUTF8": "1", "TERM": "xterm"},
        start_new_session=True,
        preexec_fn=_as_a_shell_starts_it,
    )
    os.close(follower)
    seen, deadline = "", time.monotonic() + timeout
    try:
        while not re.search(pattern, seen):
            ready = select.select([leader], [], [], max(0.0, deadline - time.monotonic()))[0]
            assert ready, f"{pattern!r} did not come in {timeout:.0f} s: {seen!r}"
            try:
                piece = os.read(leader, 65536)
            except OSError:
                piece = b""
            assert piece, f"the command ended before {pattern!r} came: {seen!r}"
            seen += piece.decode(errors="replace")
        os.close(leader)
        leader = -1
        return process.wait(timeout=max(1.0, deadline - time.monotonic()))
    finally:
        if leader >= 0:
            os.close(leader)
        process.kill()  # does nothing to a process that has ended
        process.wait()


def _as_a_shell_starts_it() -> None:
    """In the new process: make the terminal its own, and let Ctrl-C reach it.

    A test run that was started in the background ignores SIGINT, and every process inherits that.
    """
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def as_seen(raw: str) -> str:
    """What stays on the screen: without colours, and of a line that was written over the last state."""
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", raw).replace("\r\n", "\n")
    return "\n".join(line.rsplit("\r", 1)[-1].rstrip() for line in plain.split("\n"))
