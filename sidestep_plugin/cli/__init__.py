"""``acestep-train``: parse, print, call the modules above. Nothing here imports torch before a training begins."""

from __future__ import annotations

import atexit
import codecs
import os
import signal
import sys
from typing import Final

import click

from sidestep_plugin import __version__, signals
from sidestep_plugin.errors import Refusal
from sidestep_plugin.ranks import ranks

from .groups import DefaultGroup
from .terminal import unread

COMMANDS: Final = {
    "train": "Train a LoRA or LoKr with ACE-Step's own trainer.",
    "prepare": "Prepare songs to train on, from audio and texts.",
    "check": "Check whether your ACE-Step fits, without training anything.",
    "estimate": "Estimate the memory that a training needs, before it starts.",
    "songs": "Show what is in a folder of songs, and what looks wrong.",
    "recommended": "Print recommended settings for a number of songs.",
    "list": "List the checkpoints of a training.",
    "compare": "Compare adapters by their loss on the same songs.",
    "inspect": "Show what an adapter is and what to generate with.",
    "preview": "Make clips from a saved adapter, to listen to.",
    "export": "Copy an adapter for another program.",
    "average": "Average adapters or checkpoints, or bring one to another rank.",
    "publish": "Make a folder of an adapter that can be shared.",
    "run": "Run one of ACE-Step's own commands with plugins attached.",
    "timesteps": "Show at which timesteps a model is trained.",
    "schedule": "Print the timesteps of a generation.",
    "patch": "Let ACE-Step's own app and server load plugins by themselves.",
    "demo": "Run the whole job on a tiny stand-in, on a CPU, in seconds.",
    "plugins": "List the installed plugins and the hooks that each implements.",
}
"""The commands in the order of the help, each with its line there. The module of that name has the command."""


@click.group(
    cls=DefaultGroup,
    lazy=COMMANDS,
    default="train",
    bare=("train",),
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(__version__, prog_name="acestep-train")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Train ACE-Step 1.5 adapters with ACE-Step's own trainer, each model the way it was trained.

    \b
    Answer a few questions, on a terminal:
        acestep-train
    See the whole job on a stand-in, on a CPU, in seconds:
        acestep-train demo
    Train on your own preprocessed songs, from your ACE-Step folder:
        acestep-train --model base --dataset-dir DIR --output-dir DIR
    All training options:
        acestep-train train --help
    Train in ACE-Step's own app, with the plugin attached:
        acestep-train run --plugin sidestep -- acestep

    "train" is the default command and may be left out. With --plugin none it trains exactly as ACE-Step does.
    """
    from .surroundings import settle

    settle(draws_only_files=ctx.invoked_subcommand != "run")


_PLAIN = {
    "✅": "OK",
    "❌": "Failed:",
    "⚠": "Warning:",
    "💾": "Saved:",
    "📂": "-",
    "🚀": "-",
    "🎯": "-",
    "🧠": "-",
    "ℹ": "Note:",
}
_PLAIN |= {"⏹": "-", "🔄": "-", "\ufe0f": "", "–": "-", "—": "-", "×": "x", "’": "'", "…": "..."}
"""What stands for a character that the console cannot show, most of them ACE-Step's."""


def _plainly(error: UnicodeError) -> tuple[str, int]:
    """Error handler for encoding: plain words for the signs that are known, a question mark for others."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(_PLAIN.get(sign, "?") for sign in error.object[error.start : error.end]), error.end


def _one_of_several() -> bool:
    """Whether this is one of the processes of a training; variables that say nothing sensible were refused before."""
    try:
        return ranks().several
    except Refusal:
        return False


def main() -> None:
    """``acestep-train`` with the words of ``sys.argv``. Ends the program."""
    # A console that cannot show a character should show another, not end the training.
    codecs.register_error("acestep-plain", _plainly)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="acestep-plain")
    signals.take_over(signals.leave)
    atexit.register(signals.take_over, signal.SIG_IGN)  # runs last; Python then puts back every handler that is ours
    try:
        cli(prog_name="acestep-train")
    except SystemExit as ended:  # a signal that comes now changes nothing of how it ended
        for stream in (sys.stdout, sys.stderr):
            with unread(stream):
                if stream is not None:
                    stream.flush()
        code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
        signals.take_over(lambda *_: os._exit(code))
        if code and _one_of_several():  # threads that still hold a connection would abort the process while Python ends
            os._exit(code)
        raise
