"""The terminal: printing to it, whether somebody is there, and how the program was started."""

from __future__ import annotations

import os
import re
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, TextIO

import click

NAME = "acestep-train"


def say(text: str, *, err: bool = False) -> None:
    """Print lines, if anybody can still read them."""
    with unread(sys.stderr if err else sys.stdout):
        echo(text, err=err)


def echo(text: str = "", *, err: bool = False) -> None:
    """Print lines that are what a command was asked for: where they cannot be written, that is an error."""
    click.echo(for_people(text, sys.stderr if err else sys.stdout), err=err)


def say_what_takes_long(text: str) -> None:
    """Print a line about what is waited for, if somebody sits at a terminal: a pipe gets the result only."""
    if sys.stderr is not None and sys.stderr.isatty():
        say(text, err=True)


_STYLES = (
    (("Error", "❌"), {"fg": "red", "bold": True}),
    (("✅", "Adapter", "Best epoch", "Page: ", "Next:", "To resume:", "Interrupted", "Settings: "), {"bold": True}),
    (("Importing ", "Loading ", "📂", "🧠", "🚀", "🎯", "ℹ"), {"dim": True}),
)
"""How lines look on a terminal, by what they begin with; all others look as usual."""

_WARNINGS = ("Warning:", "⚠️", "⚠")
"""What is black on yellow: yellow letters cannot be read on a light ground."""

_IN_ONE_PIECE = re.compile(
    r"(Adapter|Adapter so far): ([/~]|[A-Za-z]:[/\\])|Page: |For ComfyUI: |Report: |💾|✅"
    r"|\s+(\S*[/\\]|acestep-train\b|pip |uv |git |\w+=\S+ )"
)
"""What lines begin with that hold a command or a path, which somebody may copy."""

_PATH = re.compile(r" (?=[/~]|[A-Za-z]:[/\\]|\.{1,2}[/\\])")

_FIRST_COLUMN = re.compile(r"\s*\S+(?: \S+)* {2,}(?=\S)")
"""The beginning of a line that has what is told in a column of its own."""


def for_people(text: str, stream: TextIO | None) -> str:
    """Lines as they look on a terminal: wrapped between words, and the important ones stand out.

    Without a terminal they stay as they are.
    """
    if stream is None or not stream.isatty():
        return text
    return "\n".join(_styled(wrapped(line)) for line in text.split("\n"))


def columns() -> int | None:
    """Columns that a line on standard output may take; None where it goes to no terminal."""
    import shutil

    there = sys.stdout is not None and sys.stdout.isatty()
    return shutil.get_terminal_size().columns - 1 if there else None


def cells(text: str) -> int:
    """Columns that a text takes on a terminal, where Chinese, Japanese and Korean letters take two."""
    if text.isascii():
        return len(text)
    import unicodedata

    return sum(0 if unicodedata.combining(sign) else 1 + (unicodedata.east_asian_width(sign) in "WF") for sign in text)


def wrapped(line: str) -> str:
    """A line that is wrapped between words at the terminal's width, indented behind its first column if it has one."""
    import shutil

    room = shutil.get_terminal_size().columns - 1
    if len(line) <= room or room < 20:
        return line
    if _IN_ONE_PIECE.match(line):
        path, remark, rest = line.rpartition(" (")
        if remark and line.endswith(")"):
            return f"{_before_the_path(path, room)}\n    ({rest}"
        return _before_the_path(line, room)
    import textwrap

    column = _FIRST_COLUMN.match(line)
    own = len(line) - len(line.lstrip())
    indent = column.end() if column is not None and column.end() <= room // 2 else own + (2 if own else 4)
    more = {"break_long_words": False, "break_on_hyphens": False, "replace_whitespace": False}
    whole = line.replace(" ...", "\0...")  # dots stay behind their word
    return textwrap.fill(whole, room, subsequent_indent=" " * indent, **more).replace("\0", " ")  # type: ignore[arg-type]


def _before_the_path(line: str, room: int) -> str:
    """A line with its path on a line of its own, if it fits there and not here. A command stays as it is."""
    found = _PATH.search(line)
    if len(line) <= room or line[0] == " " or found is None or len(line) - found.end() > room - 4:
        return line
    return f"{line[: found.start()]}\n    {line[found.end() :]}"


class ErrorOfUsage(click.UsageError):
    """The same as click's, which looks like other errors on a terminal."""

    def __init__(self, error: click.UsageError) -> None:
        super().__init__(error.format_message(), error.ctx)

    def show(self, file: IO[str] | None = None) -> None:
        """Print how the command is used, and the message, on standard error."""
        if file is not None or sys.stderr is None or not sys.stderr.isatty():
            return super().show(file)
        if self.ctx is not None:
            say(f"{self.ctx.get_usage()}\nTry '{self.ctx.command_path} --help' for help.\n", err=True)
        return say(f"Error: {self.message}", err=True)


def _styled(line: str) -> str:
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return line
    if (mark := next((mark for mark in _WARNINGS if line.startswith(mark)), "")) != "":
        return click.style(mark, fg="black", bg="yellow") + line.removeprefix(mark)
    style = next((style for beginnings, style in _STYLES if line.startswith(beginnings)), None)
    return line if style is None else click.style(line, **style)


@contextmanager
def unread(stream: TextIO | None) -> Iterator[None]:
    """Print in this block. A closed terminal, a pipe into head or a full disk must not end a training.

    What cannot be printed, and everything after it, goes nowhere: a stream with text left in its buffer would end the
    program with an error when Python flushes it at exit.
    """
    try:
        yield
    except OSError:
        with suppress(OSError, ValueError, AttributeError):  # a stream that is no file
            _to_nowhere(stream.fileno())  # type: ignore[union-attr]


def let_go() -> None:
    """Print to nowhere from now on where the terminal was closed. Every line, also of other libraries, would fail."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            descriptor = stream.fileno()
            if stat.S_ISCHR(os.fstat(descriptor).st_mode) and not os.isatty(descriptor):
                _to_nowhere(descriptor)


def _to_nowhere(descriptor: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


def on_a_terminal() -> bool:
    """Whether somebody is there to be asked."""
    return all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))


def program() -> str:
    """The program as it can be typed again: by its name where the shell finds it, else by the path that was typed."""
    typed = sys.argv[0]
    if os.path.basename(typed).removesuffix(".exe") != NAME:  # noqa: PTH119 - pathlib takes longer to import
        return NAME  # started as a module, or by a test
    import shutil

    found = shutil.which(NAME)
    return NAME if found is not None and _same(found, typed) else typed


def _same(one: str, other: str) -> bool:
    """Whether two paths are one file; Windows leaves .exe out of the one that was typed."""
    try:
        return os.path.samefile(one, other if os.path.exists(other) else f"{other}.exe")  # noqa: PTH110, PTH121
    except OSError:
        return False
