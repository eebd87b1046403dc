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


@dataclass
class Seen:
    """What a person at the terminal saw, and the exit code."""

    text: str
    code: int


def in_a_terminal(
    line: Sequence[object], typed: Sequence[tuple[str, str]], *, cwd: Path, width: int = 110, timeout: float = 120.0
) -> Seen:
    """Run a command; wait for each pattern in what is printed since the last answer, and type what belongs to it.

    A typed text ends with Enter, but for control characters. Raises AssertionError when a pattern does not come.
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
        preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
    )
    os.close(follower)
    seen, since = "", 0
    waiting = list(typed)
    deadline = time.monotonic() + timeout
    try:
        while time.monotonic() < deadline:
            if waiting and re.search(waiting[0][0], seen[since:]):
                answer = waiting.pop(0)[1]
                since = len(seen)
                os.write(leader, (answer if answer and answer < " " else f"{answer}\n").encode())
            if not select.select([leader], [], [], 0.1)[0]:
                continue
            try:
                piece = os.read(leader, 65536)
            except OSError:  # the other side was closed
                break
            if not piece:
                break
            seen += piece.decode(errors="replace")
    finally:
        os.close(leader)
        if process.poll() is None and time.monotonic() >= deadline:
            process.send_signal(signal.SIGKILL)
    code = process.wait(timeout=60)
    assert not waiting, f"never seen: {waiting[0][0]!r} in {seen[since:]!r}"
    return Seen(as_seen(seen), code)


def as_seen(raw: str) -> str:
    """What stays on the screen: without colours, and of a line that was written over the last state."""
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", raw).replace("\r\n", "\n")
    return "\n".join(line.rsplit("\r", 1)[-1].rstrip() for line in plain.split("\n"))
